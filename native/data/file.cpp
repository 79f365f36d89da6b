#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <system_error>
#include <utility>

#include "extents.h"
#include "memory.h"

namespace launcher::data {
namespace {

constexpr auto kFuseMagic = 0x65735546;  // FUSE_SUPER_MAGIC, linux/magic.h

// Descriptors that are kept open for files that are read: a quarter of what the process may have.
std::atomic<std::uint64_t> kept_open{0};

std::uint64_t may_keep_open() noexcept {
  rlimit limit{};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur / 4 : 256;
}

std::string in_words(int error) { return std::generic_category().message(error); }

[[noreturn]] void throw_refused(const std::string& path, const char* what, int error, std::uint64_t offset = kNowhere) {
  if (error == ENOENT || error == ENOTDIR) {
    throw DataError(Problem::changed, path, offset, kNowhere,
                    "no such file; it was removed or renamed, or the path is wrong");
  }
  std::string advice = error == EACCES   ? "; check the permissions of the file and of its folders"
                       : error == EMFILE ? "; raise the limit of open files (ulimit -n)"
                                         : "";
  throw DataError(Problem::unreadable, path, offset, kNowhere, std::string(what) + ": " + in_words(error) + advice);
}

Descriptor open_file(const std::string& path, std::uint64_t offset = kNowhere) {
  int descriptor = -1;
  do {
    descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);  // a FIFO would block
  } while (descriptor < 0 && errno == EINTR);
  if (descriptor < 0) {
    throw_refused(path, "can not be opened", errno, offset);
  }
  return Descriptor(descriptor);
}

std::int64_t nanoseconds(const timespec& time) noexcept {
  constexpr std::int64_t kPerSecond = 1'000'000'000;
  return static_cast<std::int64_t>(time.tv_sec) * kPerSecond + time.tv_nsec;
}

std::string sizes(std::uint64_t then, std::uint64_t now) {
  return "it had " + std::to_string(then) + " bytes when it was opened and has " + std::to_string(now) + " now";
}

constexpr const char* kLeaveAlone = "; a channel's files must stay as they are while they are read";

}  // namespace

bool served_by_fuse(const std::string& path) {
  struct statfs system{};
  if (statfs(path.c_str(), &system) != 0) {
    throw_refused(path, "its file system can not be told", errno);
  }
  return system.f_type == kFuseMagic;
}

File::File(std::string path, Access access) : path_(std::move(path)) {
  Descriptor descriptor = open_file(path_);
  struct stat status{};
  struct statfs system{};
  if (fstat(descriptor.get(), &status) != 0 || fstatfs(descriptor.get(), &system) != 0) {
    throw_refused(path_, "its size can not be told", errno);
  }
  if (!S_ISREG(status.st_mode)) {
    throw DataError(Problem::unreadable, path_, kNowhere, kNowhere,
                    std::string("is a ") +
                        (S_ISDIR(status.st_mode)    ? "folder"
                         : S_ISFIFO(status.st_mode) ? "FIFO"
                                                    : "device or socket") +
                        ", where a regular file is wanted");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
  modified_ns_ = nanoseconds(status.st_mtim);
  mapped_ = access == Access::mapped || (access == Access::automatic && system.f_type != kFuseMagic);
  if (mapped_ && size_ != 0) {
    void* address = MAP_FAILED;
    if (size_ <= std::numeric_limits<std::size_t>::max()) {
      address = mmap(nullptr, static_cast<std::size_t>(size_), PROT_READ, MAP_SHARED, descriptor.get(), 0);
    }
    if (address != MAP_FAILED) {
      region_ = watch_region(static_cast<const std::byte*>(address), size_);
      if (region_ == kNoRegion) {
        munmap(address, static_cast<std::size_t>(size_));
      } else {
        data_ = static_cast<const std::byte*>(address);
      }
    } else if (access == Access::mapped) {
      throw_refused(path_, "can not be mapped", errno);
    }
    mapped_ = data_ != nullptr;
    if (!mapped_ && access == Access::mapped) {
      throw DataError(Problem::unreadable, path_, kNowhere, kNowhere,
                      "too many files are mapped at the same time; open this one to be read");
    }
  }
  if (!mapped_) {
    if (kept_open.fetch_add(1) < may_keep_open()) {
      descriptor_ = std::move(descriptor);
    } else {
      kept_open.fetch_sub(1);
    }
    static std::atomic<std::uint64_t> opened{0};
    number_ = opened.fetch_add(1);
  }
}

File::~File() {
  if (data_ != nullptr) {
    forget_region(region_);
    munmap(const_cast<std::byte*>(data_), static_cast<std::size_t>(size_));
  }
  if (descriptor_) {
    kept_open.fetch_sub(1);
  }
  if (!mapped_) {
    extents().drop(number_);
  }
}

std::span<const std::byte> File::view(std::uint64_t offset, std::size_t bytes, std::byte* memory) const {
  if (offset > size_ || bytes > size_ - offset) {
    throw DataError(Problem::changed, path_, offset, kNowhere,
                    "the index has " + std::to_string(bytes) + " bytes of a record here, the file has " +
                        std::to_string(size_) + " in all; index it again");
  }
  if (mapped_) {
    return {data_ + offset, bytes};
  }
  if (bytes >= kExtentBytes) {
    read(offset, {memory, bytes});
  } else {
    extents().copy(number_, size_, offset, {memory, bytes},
                   [this](std::uint64_t from, std::span<std::byte> to) { read(from, to); });
  }
  return {memory, bytes};
}

void File::read(std::uint64_t offset, std::span<std::byte> memory) const {
  const Descriptor opened = descriptor_ ? Descriptor() : open_file(path_, offset);
  const int descriptor = descriptor_ ? descriptor_.get() : opened.get();
  std::size_t done = 0;
  while (done < memory.size()) {
    const ssize_t got =
        pread(descriptor, memory.data() + done, memory.size() - done, static_cast<off_t>(offset + done));
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (got == 0) {
      throw DataError(
          Problem::changed, path_, offset + done, kNowhere,
          "the file ends here now, but had " + std::to_string(size_) + " bytes when it was opened" + kLeaveAlone);
    } else if (errno != EINTR) {
      throw_refused(path_, "can not be read", errno, offset + done);
    }
  }
}

void File::check_faults(std::uint64_t offset, std::uint64_t bytes) const {
  if (file_faults() == 0 || region_ == kNoRegion) {
    return;
  }
  const std::uint64_t lost = lost_byte(region_, offset, bytes);
  if (lost >= size_) {
    return;
  }
  struct stat status{};
  if (stat(path_.c_str(), &status) != 0) {
    throw_refused(path_, "can not be read any more", errno, lost);
  }
  const auto now = static_cast<std::uint64_t>(status.st_size);
  if (now < size_) {
    throw DataError(Problem::changed, path_, lost, kNowhere,
                    "the file was cut while it was read: " + sizes(size_, now) + kLeaveAlone);
  }
  throw DataError(Problem::unreadable, path_, lost, kNowhere,
                  "the operating system could not read these bytes (an error of the disk, or of what serves the file; "
                  "the kernel's log may say more)");
}

void File::check_unchanged() const {
  if (region_ != kNoRegion) {
    watch_again();
  }
  struct stat status{};
  if (stat(path_.c_str(), &status) != 0) {
    throw_refused(path_, "can not be found any more", errno);
  }
  const auto now = static_cast<std::uint64_t>(status.st_size);
  if (now != size_) {
    throw DataError(Problem::changed, path_, now < size_ ? now : kNowhere, kNowhere,
                    "it was changed: " + sizes(size_, now) + kLeaveAlone);
  }
  if (nanoseconds(status.st_mtim) != modified_ns_) {
    throw DataError(Problem::changed, path_, kNowhere, kNowhere,
                    std::string("it was written to since it was opened (its time of change is another)") + kLeaveAlone);
  }
}

// A part of a mapped file, with the rest of its first page: what madvise() takes.
void File::advise_range(std::uint64_t offset, std::uint64_t bytes, int advice) const noexcept {
  static const std::uint64_t page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  if (data_ != nullptr && offset < size_) {
    const std::uint64_t begin = offset / page * page;
    const std::uint64_t end = offset + std::min(bytes, size_ - offset);
    // What can not be read shows when it is touched, and what a kernel does not know of it does without.
    madvise(const_cast<std::byte*>(data_) + begin, static_cast<std::size_t>(end - begin), advice);
  }
}

void File::expect(std::uint64_t offset, std::uint64_t bytes) const noexcept {
  advise_range(offset, bytes, MADV_WILLNEED);
}

void File::populate(std::uint64_t offset, std::uint64_t bytes) const noexcept {
#ifdef MADV_POPULATE_READ
  advise_range(offset, bytes, MADV_POPULATE_READ);
#else
  static_cast<void>(offset);
  static_cast<void>(bytes);
#endif
}

void File::advise(Pattern pattern) const noexcept {
  if (data_ == nullptr) {
    return;
  }
  const auto say = [this](int what) {
    madvise(const_cast<std::byte*>(data_), static_cast<std::size_t>(size_), what);  // a kernel may not know of it
  };
  say(pattern == Pattern::scattered ? MADV_RANDOM : MADV_NORMAL);
  if (pattern == Pattern::kept) {
    say(MADV_HUGEPAGE);
  }
}

Pattern advise(std::span<const std::shared_ptr<const File>> files, bool any_order) noexcept {
  std::uint64_t bytes = 0;
  for (const auto& file : files) {
    bytes += file->mapped() ? file->size() : 0;
  }
  const bool kept = bytes != 0 && bytes <= available_memory() / 2;  // the other half is for the training
  const Pattern pattern = kept ? Pattern::kept : any_order ? Pattern::scattered : Pattern::onward;
  for (const auto& file : files) {
    file->advise(pattern);
  }
  return pattern;
}

}  // namespace launcher::data
