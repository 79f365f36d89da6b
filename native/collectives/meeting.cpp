#include "meeting.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace launcher::collectives {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kTick = std::chrono::milliseconds(50);

struct Hello {
  std::uint32_t magic = kSegmentMagic;
  std::int32_t rank = 0;
  std::int32_t size = 0;
};

struct Welcome {
  std::uint32_t failure = 0;  // 0: all are there; else Failure + 1
  std::int32_t culprit = -1;
  std::uint64_t segment_bytes = 0;
  std::array<std::int32_t, kMaxRanks> pids{};
  std::array<char, 512> reason{};
};

class Join {
 public:
  explicit Join(const Options& options) : options_(options), deadline_(Clock::now() + options.timeout) {
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
    const std::string path = file();
    if (options.name.empty() || options.name.find('/') != std::string::npos ||
        path.size() >= sizeof(sockaddr_un::sun_path)) {
      throw std::invalid_argument("group name '" + options.name + "': expected a file name of at most 70 characters");
    }
  }

  // Through the open folder: a path of any length fits in the 108 bytes of a socket address.
  std::string file() const { return "/proc/self/fd/" + std::to_string(folder_.get()) + "/" + options_.name; }

  sockaddr_un address() const {
    sockaddr_un out{};
    out.sun_family = AF_UNIX;
    const std::string path = file();
    std::copy(path.begin(), path.end(), out.sun_path);
    return out;
  }

  [[noreturn]] void fail(Failure failure, int rank, const std::string& what) const {
    throw GroupError(failure, rank < 0 ? -1 : job_rank(options_, rank), options_.host, "join", 0,
                     "join #0 of group " + options_.name + ": " + what);
  }

  bool expired() const { return Clock::now() >= deadline_; }
  std::string limit() const {
    const auto seconds = std::chrono::duration<double>(options_.timeout).count();
    std::array<char, 32> text;
    static_cast<void>(std::snprintf(text.data(), text.size(), "%.3g s", seconds));
    return text.data();
  }
  void check_interrupt() const {
    if (options_.interrupted && options_.interrupted()) {
      fail(Failure::interrupted, options_.rank, place_of(options_, options_.rank) + " was interrupted while it waited");
    }
  }
  int tick_ms() const {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
    return static_cast<int>(std::clamp<std::int64_t>(left + 1, 1, kTick.count()));
  }

 protected:
  const Options& options_;
  Clock::time_point deadline_;
  Descriptor folder_;
};

Descriptor new_socket() {
  Descriptor out(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!out) {
    throw_system("socket");
  }
  return out;
}

void send_welcome(int socket, const Welcome& welcome, const std::vector<int>& descriptors, Clock::time_point deadline) {
  iovec body{const_cast<Welcome*>(&welcome), sizeof welcome};
  msghdr message{};
  message.msg_iov = &body;
  message.msg_iovlen = 1;
  std::vector<char> control(CMSG_SPACE(descriptors.size() * sizeof(int)));
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
  }
  // A user may have only so many descriptors on their way (RLIMIT_NOFILE): the ranks that have theirs take them in
  // meanwhile. Who is gone by now is found out by the first wait for it.
  while (::sendmsg(socket, &message, MSG_NOSIGNAL) < 0 &&
         (errno == ETOOMANYREFS || errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == EINTR) &&
         Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

// The first rank: waits for the others.
class Host : Join {
 public:
  explicit Host(const Options& options)
      : Join(options), peers_(static_cast<std::size_t>(options.size)), pids_(peers_.size(), 0) {
    socket_ = new_socket();
    ::unlink(file().c_str());  // of a job that was killed; the names of two attempts differ
    const sockaddr_un own = address();
    if (::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&own), sizeof own) != 0 ||
        ::listen(socket_.get(), options.size) != 0) {
      throw_system("socket of group " + options.name + " in " + options.directory);
    }
    named_ = true;
  }
  ~Host() { forget(); }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  Meeting run(std::size_t slot_bytes) {
    try {
      while (missing() > 0) {
        wait_for_one();
      }
    } catch (const GroupError& error) {
      Welcome no;
      no.failure = static_cast<std::uint32_t>(error.failure()) + 1;
      no.culprit = culprit_;
      const std::string text = reason_;
      std::copy_n(text.begin(), std::min(text.size(), no.reason.size() - 1), no.reason.begin());
      for (const Descriptor& peer : peers_) {
        if (peer) {
          send_welcome(peer.get(), no, {}, Clock::now() + kTick);
        }
      }
      turn_away(no);
      throw;
    }
    forget();
    return welcome(slot_bytes);
  }

 private:
  // Who has called but was not greeted yet hears the reason too: it would take this rank for dead otherwise.
  void turn_away(const Welcome& no) noexcept {
    forget();
    for (;;) {
      Descriptor stranger(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!stranger) {
        break;
      }
      static_cast<void>(::send(stranger.get(), &no, sizeof no, MSG_NOSIGNAL));
    }
    for (const Descriptor& stranger : strangers_) {
      static_cast<void>(::send(stranger.get(), &no, sizeof no, MSG_NOSIGNAL));
    }
  }

  void forget() noexcept {
    if (named_) {
      ::unlink(file().c_str());
      named_ = false;
    }
  }

  std::size_t missing() const {
    return static_cast<std::size_t>(std::count_if(peers_.begin() + 1, peers_.end(), [](const auto& p) { return !p; }));
  }

  [[noreturn]] void give_up(Failure failure, int rank, const std::string& what) {
    culprit_ = rank;
    reason_ = what;
    fail(failure, rank, what);
  }

  void wait_for_one() {
    std::vector<pollfd> polled{{socket_.get(), POLLIN, 0}};
    std::vector<std::size_t> ranks{0};
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      if (peers_[rank]) {
        polled.push_back({peers_[rank].get(), POLLIN, 0});
        ranks.push_back(rank);
      }
    }
    for (std::size_t index = 0; index < strangers_.size(); ++index) {
      polled.push_back({strangers_[index].get(), POLLIN, 0});
    }
    if (::poll(polled.data(), polled.size(), tick_ms()) < 0 && errno != EINTR) {
      throw_system("poll");
    }
    for (std::size_t index = 1; index < ranks.size(); ++index) {
      if (polled[index].revents != 0) {  // a rank that waits says nothing
        const int rank = static_cast<int>(ranks[index]);
        give_up(Failure::lost, rank, place_of(options_, rank) + " has died while the group was being made");
      }
    }
    for (std::size_t index = strangers_.size(); index-- > 0;) {
      if (polled[ranks.size() + index].revents != 0) {
        Descriptor stranger = std::move(strangers_[index]);
        strangers_.erase(strangers_.begin() + static_cast<std::ptrdiff_t>(index));
        greet(std::move(stranger));
      }
    }
    if (polled[0].revents != 0) {
      Descriptor stranger(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (stranger) {
        strangers_.push_back(std::move(stranger));
      }
    }
    check_interrupt();
    if (expired() && missing() > 0) {
      std::string names;
      int first = -1;
      for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
        if (!peers_[rank]) {
          first = first < 0 ? static_cast<int>(rank) : first;
          names += (names.empty() ? "" : ", ") + place_of(options_, static_cast<int>(rank));
        }
      }
      give_up(Failure::timeout, first, names + " did not come within " + limit());
    }
  }

  void greet(Descriptor peer) {
    Hello hello;
    ucred who{};
    socklen_t length = sizeof who;
    if (::recv(peer.get(), &hello, sizeof hello, 0) != static_cast<ssize_t>(sizeof hello) ||
        ::getsockopt(peer.get(), SOL_SOCKET, SO_PEERCRED, &who, &length) != 0 || who.uid != ::geteuid() ||
        hello.magic != kSegmentMagic) {
      return;  // not one of ours
    }
    const bool known = hello.rank > 0 && hello.rank < options_.size;
    if (!known || hello.size != options_.size) {
      give_up(Failure::mismatch, known ? hello.rank : -1,
              "a process says that it is rank " + std::to_string(hello.rank) + " of " + std::to_string(hello.size) +
                  ", here the group has " + std::to_string(options_.size));
    }
    const auto rank = static_cast<std::size_t>(hello.rank);
    if (peers_[rank]) {
      give_up(Failure::mismatch, hello.rank, place_of(options_, hello.rank) + " came twice");
    }
    if (who.pid <= 0) {
      give_up(Failure::system, hello.rank,
              place_of(options_, hello.rank) + " is in another process namespace: its end could not be seen");
    }
    peers_[rank] = std::move(peer);
    pids_[rank] = who.pid;
  }

  Meeting welcome(std::size_t slot_bytes) {
    Meeting out;
    Welcome yes;
    yes.segment_bytes = Segment::bytes_for(options_.size, slot_bytes);
    const Descriptor memory = Segment::create(options_.size, slot_bytes);
    pids_[0] = ::getpid();
    std::vector<Descriptor> inboxes;
    std::vector<int> sent{memory.get(), -1};
    for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
      std::array<int, 2> pair{};
      if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair.data()) != 0) {
        throw_system("socketpair");
      }
      inboxes.emplace_back(pair[0]);
      out.outboxes.emplace_back(pair[1]);
      sent.push_back(pair[1]);
      yes.pids[rank] = pids_[rank];
    }
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      sent[1] = inboxes[rank].get();
      send_welcome(peers_[rank].get(), yes, sent, deadline_);
      out.processes.resize(rank);
      out.processes.emplace_back(pids_[rank]);
    }
    out.processes.resize(peers_.size());
    out.inbox = std::move(inboxes[0]);
    out.segment = std::make_unique<Segment>(memory, yes.segment_bytes);
    return out;
  }

  Descriptor socket_;
  bool named_ = false;
  std::vector<Descriptor> peers_;  // by rank
  std::vector<pid_t> pids_;
  std::vector<Descriptor> strangers_;
  int culprit_ = -1;
  std::string reason_;
};

class Guest : Join {
 public:
  explicit Guest(const Options& options) : Join(options) {}

  Meeting run() {
    connect();
    const Hello hello{kSegmentMagic, options_.rank, options_.size};
    // A first rank that has given up may have left an answer, and closed its end.
    static_cast<void>(::send(socket_.get(), &hello, sizeof hello, MSG_NOSIGNAL));
    pollfd answer{socket_.get(), POLLIN, 0};
    // The first rank knows who is missing and says so at its own deadline; only then is this one's over.
    const auto patience = deadline_ + std::chrono::seconds(1);
    while (::poll(&answer, 1, static_cast<int>(kTick.count())) <= 0) {
      check_interrupt();
      if (Clock::now() >= patience) {
        fail(Failure::timeout, 0, place_of(options_, 0) + " gave no answer within " + limit());
      }
    }
    return receive();
  }

 private:
  [[noreturn]] void lost_host() const {
    fail(Failure::lost, 0, place_of(options_, 0) + " has died while the group was being made");
  }

  void connect() {
    auto pause = std::chrono::microseconds(100);
    const sockaddr_un there = address();
    for (;;) {
      socket_ = new_socket();
      if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&there), sizeof there) == 0) {
        return;
      }
      if (errno != ENOENT && errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR) {
        throw_system("connect to group " + options_.name + " in " + options_.directory);
      }
      check_interrupt();
      if (expired()) {
        fail(Failure::timeout, 0, place_of(options_, 0) + " did not come within " + limit());
      }
      std::this_thread::sleep_for(pause);  // there is nothing to wait on before the file is there
      pause = std::min(pause * 2, std::chrono::microseconds(10000));
    }
  }

  Meeting receive() {
    Welcome welcome;
    iovec body{&welcome, sizeof welcome};
    std::array<char, CMSG_SPACE((kMaxRanks + 2) * sizeof(int))> control;
    msghdr message{};
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    ssize_t count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (count < 0 && errno == ECONNRESET) {  // it closed with our hello unread; what it said comes after this error
      count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    }
    if (count <= 0) {
      lost_host();
    }
    std::vector<Descriptor> received;
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
      if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
        const std::size_t many = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t index = 0; index < many; ++index) {
          int fd;
          std::memcpy(&fd, CMSG_DATA(header) + index * sizeof(int), sizeof fd);
          received.emplace_back(fd);
        }
      }
    }
    if (count != static_cast<ssize_t>(sizeof welcome)) {
      throw std::invalid_argument("group " + options_.name + ": rank 0 is of another build of this package");
    }
    if (welcome.failure != 0) {
      welcome.reason.back() = '\0';
      const auto failure = static_cast<Failure>(welcome.failure - 1);
      fail(failure > Failure::system ? Failure::system : failure, welcome.culprit, welcome.reason.data());
    }
    const auto ranks = static_cast<std::size_t>(options_.size);
    if (received.size() != ranks + 2) {
      fail(Failure::system, options_.rank,
           place_of(options_, options_.rank) + " got " + std::to_string(received.size()) + " of " +
               std::to_string(ranks + 2) + " descriptors: raise its limit of open files (ulimit -n)");
    }
    Meeting out;
    out.segment = std::make_unique<Segment>(received[0], welcome.segment_bytes);
    out.inbox = std::move(received[1]);
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      out.outboxes.push_back(std::move(received[rank + 2]));
      out.processes.push_back(static_cast<int>(rank) == options_.rank ? Process() : Process(welcome.pids[rank]));
    }
    return out;
  }

  Descriptor socket_;
};

}  // namespace

int job_rank(const Options& options, int rank) noexcept {
  return options.ranks.empty() ? rank : options.ranks[static_cast<std::size_t>(rank)];
}

std::string place_of(const Options& options, int rank) {
  return "rank " + std::to_string(job_rank(options, rank)) + (options.host.empty() ? "" : " on " + options.host);
}

Meeting meet(const Options& options, std::size_t slot_bytes) {
  if (options.rank == 0) {
    return Host(options).run(slot_bytes);
  }
  return Guest(options).run();
}

}  // namespace launcher::collectives
