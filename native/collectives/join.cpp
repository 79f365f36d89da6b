#include "join.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "meeting.h"

namespace launcher::collectives {
namespace {

constexpr auto kTick = std::chrono::milliseconds(50);

std::string seconds(double span) {
  std::array<char, 32> text;
  static_cast<void>(std::snprintf(text.data(), text.size(), "%.3g s", span));
  return text.data();
}

bool is_lack_of_descriptors(const std::exception& error) noexcept {
  const auto* system = dynamic_cast<const std::system_error*>(&error);
  return system != nullptr && (system->code().value() == EMFILE || system->code().value() == ENFILE);
}

}  // namespace

Text to_text(const std::string& words) noexcept {
  Text out{};
  std::copy_n(words.begin(), std::min(words.size(), out.size() - 1), out.begin());
  return out;
}

std::string to_string(const Text& text) { return {text.data(), ::strnlen(text.data(), text.size())}; }

Join::Join(const Options& options) : options_(options) {
  start_clock();
  folder_ = Descriptor(::open(options.directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!folder_) {
    throw_system("directory " + options.directory + " of group " + options.name);
  }
  struct stat info;
  if (::fstat(folder_.get(), &info) != 0) {
    throw_system("fstat of " + options.directory);
  }
  if (info.st_uid != ::geteuid() || (info.st_mode & 077) != 0) {
    std::array<char, 16> mode;
    static_cast<void>(std::snprintf(mode.data(), mode.size(), "%04o", info.st_mode & 07777U));
    throw std::invalid_argument("directory " + options.directory + " (mode " + mode.data() +
                                ") may be entered by other users: ranks meet in one of mode 0700 that is their own");
  }
  if (options.name.empty() || options.name.find('/') != std::string::npos ||
      file().size() >= sizeof(sockaddr_un::sun_path)) {
    throw std::invalid_argument("group name '" + options.name + "': expected a file name of at most 70 characters");
  }
}

// Through the open folder: a path of any length fits in the 108 bytes of a socket address.
std::string Join::file() const { return "/proc/self/fd/" + std::to_string(folder_.get()) + "/" + options_.name; }

sockaddr_un Join::address() const {
  sockaddr_un out{};
  out.sun_family = AF_UNIX;
  const std::string path = file();
  std::copy(path.begin(), path.end(), out.sun_path);
  return out;
}

void Join::fail(Failure failure, int rank, const std::string& what) const {
  throw GroupError(failure, rank < 0 ? -1 : job_rank(options_, rank), options_.host, "join", 0,
                   "join #0: " + what + " (group " + options_.name + ")");
}

void Join::start_clock() {
  const auto now = Clock::now();
  const auto most = Clock::time_point::max() - now;
  deadline_ = options_.timeout > most ? Clock::time_point::max() : now + options_.timeout;
}

int Join::tick_ms() const {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left + 1, 1, kTick.count()));
}

std::string Join::limit() const { return seconds(std::chrono::duration<double>(options_.timeout).count()); }

std::string Join::place(int rank) const { return place_of(options_, rank); }

std::string Join::lack_of_descriptors() const {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  // The first rank: a connection and both ends of a mailbox for each rank. Others: an end of each mailbox, and a handle
  // of each process.
  const int needed = options_.rank == 0 ? 3 * options_.size + 2 : 2 * options_.size + 3;
  return own_place() + " has no descriptors left: to join a group of " + std::to_string(options_.size) +
         " ranks it needs " + std::to_string(needed) + " beside those that its program has open, and its limit is " +
         std::to_string(limit.rlim_cur) + " (RLIMIT_NOFILE); raise it (ulimit -n)";
}

std::string Join::explain(const std::exception& error) const {
  return is_lack_of_descriptors(error) ? lack_of_descriptors() : own_place() + " could not take part: " + error.what();
}

void Join::rethrow(const std::exception& error) const {
  if (is_lack_of_descriptors(error)) {
    fail(Failure::system, options_.rank, lack_of_descriptors());
  }
  throw;
}

std::string Join::letter(int to, int from) const {
  return options_.name + "~" + std::to_string(to) + "~" + std::to_string(from);
}

void Join::send_letter(int to, const End& end) const noexcept {
  const std::string name = letter(to, options_.rank);
  const std::string draft = name + "~";
  bool sent = false;
  if (const Descriptor out(
          ::openat(folder_.get(), draft.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600));
      out) {
    sent = ::write(out.get(), &end, sizeof end) == static_cast<ssize_t>(sizeof end) &&
           ::renameat(folder_.get(), draft.c_str(), folder_.get(), name.c_str()) == 0;
  }
  if (!sent) {  // the disk is full, say: the rank will wait for its own time
    ::unlinkat(folder_.get(), draft.c_str(), 0);
  }
}

void Join::withdraw_letter(int to) const noexcept { ::unlinkat(folder_.get(), letter(to, options_.rank).c_str(), 0); }

std::optional<End> Join::take_letter(int from) const noexcept {
  const std::string name = letter(options_.rank, from);
  const Descriptor in(::openat(folder_.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  if (!in) {
    return std::nullopt;
  }
  ::unlinkat(folder_.get(), name.c_str(), 0);
  End end;
  const bool whole = ::read(in.get(), &end, sizeof end) == static_cast<ssize_t>(sizeof end);
  return whole && end.failure != 0 ? std::optional(end) : std::nullopt;
}

std::string Join::too_late(const End& end) const {
  const double ago = static_cast<double>(monotonic_ns() - end.at_ns) / 1e9;
  return to_string(end.reason) + "; the meeting ended " + seconds(ago) + " ago, and " + own_place() +
         ", this one, came too late for it";
}

End Join::make_end(Failure failure, int culprit, const std::string& reason) noexcept {
  // Only the rank itself was interrupted; for the others it has left.
  const Failure told = failure == Failure::interrupted ? Failure::left : failure;
  return {static_cast<std::uint32_t>(told) + 1, culprit, monotonic_ns(), to_text(reason)};
}

Failure Join::failure_of(const End& end) noexcept {
  return end.failure - 1 > static_cast<std::uint32_t>(Failure::system) ? Failure::system
                                                                       : static_cast<Failure>(end.failure - 1);
}

int Join::culprit_of(const End& end) const noexcept {
  return end.culprit < 0 || end.culprit >= options_.size ? -1 : end.culprit;
}

}  // namespace launcher::collectives
