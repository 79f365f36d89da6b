#include "launcher/status_page.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "launcher/descriptor.h"

namespace launcher {
namespace {

static_assert(std::atomic_ref<std::uint32_t>::is_always_lock_free);
static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free,
              "a lock would live in one process only, and the page is shared by two");

template <typename T>
T load(T& field, std::memory_order order) noexcept {
  return std::atomic_ref<T>(field).load(order);
}

template <typename T>
void store(T& field, T value, std::memory_order order) noexcept {
  std::atomic_ref<T>(field).store(value, order);
}

// A seqlock without fences (ThreadSanitizer does not model fences). Every datum is stored with release and loaded with
// acquire: a reader that sees one new datum therefore also sees the odd counter stored before it, and its second look
// at the counter differs from its first. On x86-64 all of these are plain moves.
class WriteSection {
 public:
  // `| 1`: a writer that died inside its section left the counter odd; the next one carries on from there.
  explicit WriteSection(std::uint64_t& lock) noexcept : lock_(lock), odd_(load(lock, std::memory_order_relaxed) | 1U) {
    store(lock_, odd_, std::memory_order_relaxed);
  }
  ~WriteSection() { store(lock_, odd_ + 1, std::memory_order_release); }
  WriteSection(const WriteSection&) = delete;
  WriteSection& operator=(const WriteSection&) = delete;

  void set(std::uint64_t& field, std::uint64_t value) noexcept { store(field, value, std::memory_order_release); }

 private:
  std::uint64_t& lock_;
  std::uint64_t odd_;
};

// A section takes some ten nanoseconds to write. A reader that has failed this often looks at a writer that was killed
// or stopped inside of one, and must not wait for it.
constexpr int kReadAttempts = 1000;

// Calls `copy` until the lock shows that nothing was written meanwhile. False: it never did; the last copy stands.
template <typename Copy>
bool read_section(std::uint64_t& lock, Copy copy) {
  for (int attempt = 0; attempt < kReadAttempts; ++attempt) {
    const std::uint64_t before = load(lock, std::memory_order_acquire);
    copy();
    const bool unchanged = load(lock, std::memory_order_relaxed) == before;
    if (unchanged && before % 2 == 0) {
      return true;
    }
  }
  return false;
}

std::string unpack(const OperationName& words) {
  std::array<char, kOperationSize> text;
  std::memcpy(text.data(), words.data(), kOperationSize);
  return {text.begin(), std::find(text.begin(), text.end(), '\0')};
}

int open_file(const std::string& path, int flags) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, S_IRUSR | S_IWUSR);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    throw StatusPageIoError(errno, "open", path);
  }
  return fd;
}

StatusLayout* map_file(const Descriptor& file, const std::string& path, StatusPage::Access access) {
  const int protection = access == StatusPage::Access::write ? PROT_READ | PROT_WRITE : PROT_READ;
  void* address = ::mmap(nullptr, kStatusPageSize, protection, MAP_SHARED, file.get(), 0);
  if (address == MAP_FAILED) {
    throw StatusPageIoError(errno, "mmap", path);
  }
  return static_cast<StatusLayout*>(address);
}

void write_whole(const Descriptor& file, const std::string& path, const StatusLayout& page) {
  const char* bytes = reinterpret_cast<const char*>(&page);
  std::size_t done = 0;
  while (done < kStatusPageSize) {
    const ssize_t count = ::pwrite(file.get(), bytes + done, kStatusPageSize - done, static_cast<off_t>(done));
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (count == 0 || errno != EINTR) {
      throw StatusPageIoError(count == 0 ? ENOSPC : errno, "pwrite", path);
    }
  }
}

void check_header(const StatusLayout& page, const std::string& path) {
  if (std::memcmp(page.magic, kStatusPageMagic, sizeof kStatusPageMagic) != 0) {
    throw StatusPageError(path, "not a status page (bad magic)");
  }
  if (page.version != kStatusPageVersion) {
    throw StatusPageError(path, "layout version " + std::to_string(page.version) + ", this build reads version " +
                                    std::to_string(kStatusPageVersion));
  }
}

}  // namespace

OperationName operation_name(std::string_view text) noexcept {
  OperationName words{};
  std::memcpy(words.data(), text.data(), std::min(text.size(), kOperationSize - 1));
  return words;
}

std::uint64_t monotonic_ns() noexcept {
  timespec now;
  ::clock_gettime(CLOCK_MONOTONIC, &now);  // can not fail with this clock and a valid pointer
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

StatusPageIoError::StatusPageIoError(int error, const char* call, const std::string& path)
    : std::system_error(error, std::generic_category(), "status page " + path + ": " + call),
      path_(path),
      call_(call) {}

StatusPageError::StatusPageError(const std::string& path, const std::string& problem)
    : std::runtime_error("status page " + path + ": " + problem) {}

StatusPage::StatusPage(std::string path, StatusLayout* page, Access access) noexcept
    : path_(std::move(path)), page_(page), access_(access) {}

StatusPage::StatusPage(StatusPage&& other) noexcept
    : path_(std::move(other.path_)), page_(std::exchange(other.page_, nullptr)), access_(other.access_) {}

StatusPage& StatusPage::operator=(StatusPage&& other) noexcept {
  if (this != &other) {
    close();
    path_ = std::move(other.path_);
    page_ = std::exchange(other.page_, nullptr);
    access_ = other.access_;
  }
  return *this;
}

StatusPage::~StatusPage() { close(); }

void StatusPage::close() noexcept {
  if (page_ != nullptr) {
    ::munmap(page_, kStatusPageSize);
    page_ = nullptr;
  }
}

StatusPage StatusPage::create(const std::string& path, std::uint32_t rank) {
  const Descriptor file(open_file(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW));
  try {
    StatusLayout initial{};
    std::memcpy(initial.magic, kStatusPageMagic, sizeof kStatusPageMagic);
    initial.version = kStatusPageVersion;
    initial.rank = rank;
    write_whole(file, path, initial);
    return {path, map_file(file, path, Access::write), Access::write};
  } catch (...) {
    ::unlink(path.c_str());  // ours: O_EXCL made it; half a page must not be found by a rank
    throw;
  }
}

StatusPage StatusPage::open(const std::string& path, Access access) {
  const Descriptor file(open_file(path, access == Access::write ? O_RDWR : O_RDONLY));
  struct stat info;
  if (::fstat(file.get(), &info) != 0) {
    throw StatusPageIoError(errno, "fstat", path);
  }
  // Before the mapping is touched: a page beyond the end of the file would be a SIGBUS.
  if (!S_ISREG(info.st_mode) || info.st_size != static_cast<off_t>(kStatusPageSize)) {
    throw StatusPageError(path, "not a status page (" + std::to_string(info.st_size) + " bytes, expected a file of " +
                                    std::to_string(kStatusPageSize) + ")");
  }
  StatusPage page(path, map_file(file, path, access), access);
  check_header(*page.page_, path);
  return page;
}

StatusLayout& StatusPage::readable() const {
  if (page_ == nullptr) {
    throw StatusPageError(path_, "already closed");
  }
  return *page_;
}

StatusLayout& StatusPage::writeable() {
  StatusLayout& page = readable();
  if (access_ != Access::write) {
    throw StatusPageError(path_, "opened for reading only");
  }
  return page;
}

void StatusPage::attach() {
  StatusLayout& page = writeable();
  store(page.started_ns, monotonic_ns(), std::memory_order_relaxed);
  store(page.pid, static_cast<std::uint32_t>(::getpid()), std::memory_order_release);
  heartbeat();
}

void StatusPage::set_phase(Phase phase) {
  store(writeable().phase, static_cast<std::uint32_t>(phase), std::memory_order_release);
}

void StatusPage::step(std::uint64_t number, std::uint64_t samples) {
  StatusLayout& page = writeable();
  const std::uint64_t now = monotonic_ns();
  {
    WriteSection section(page.progress_lock);
    section.set(page.step, number);
    section.set(page.samples, samples);
    section.set(page.step_ns, now);
  }
  store(page.heartbeat_ns, now, std::memory_order_relaxed);
}

void StatusPage::heartbeat() { store(writeable().heartbeat_ns, monotonic_ns(), std::memory_order_relaxed); }

std::uint64_t StatusPage::enter_collective(std::string_view operation, std::uint64_t bytes) {
  return enter_collective(operation_name(operation), bytes, monotonic_ns());
}

std::uint64_t StatusPage::enter_collective(const OperationName& operation, std::uint64_t bytes, std::uint64_t now_ns,
                                           std::uint64_t group_sequence) {
  StatusLayout& page = writeable();
  const std::uint64_t number = load(page.collective_seq, std::memory_order_relaxed) + 1;
  {
    WriteSection section(page.collective_lock);
    section.set(page.collective_seq, number);
    section.set(page.bytes, bytes);
    section.set(page.collective_enter_ns, now_ns);
    section.set(page.group_sequence, group_sequence);
    for (std::size_t i = 0; i < operation.size(); ++i) {
      section.set(page.operation[i], operation[i]);
    }
  }
  set_collective_phase(CollectivePhase::entering);
  store(page.heartbeat_ns, now_ns, std::memory_order_relaxed);
  return number;
}

void StatusPage::leave_collective() { leave_collective(monotonic_ns()); }

void StatusPage::leave_collective(std::uint64_t now_ns) {
  StatusLayout& page = writeable();
  set_collective_phase(CollectivePhase::outside);
  store(page.waiting_for, 0U, std::memory_order_relaxed);
  {
    WriteSection section(page.collective_lock);
    section.set(page.collective_enter_ns, 0);
  }
  store(page.heartbeat_ns, now_ns, std::memory_order_relaxed);
}

void StatusPage::set_collective_phase(CollectivePhase phase) {
  store(writeable().collective_phase, static_cast<std::uint32_t>(phase), std::memory_order_relaxed);
}

void StatusPage::set_waiting_for(int rank) {
  store(writeable().waiting_for, static_cast<std::uint32_t>(rank + 1), std::memory_order_relaxed);
}

void StatusPage::add_collective_wait(std::uint64_t ns) {
  std::uint64_t& waits = writeable().collective_waits_ns;
  store(waits, load(waits, std::memory_order_relaxed) + ns, std::memory_order_relaxed);  // one writer: no lost update
}

bool StatusPage::stop_requested() const { return load(readable().stop_requested_ns, std::memory_order_acquire) != 0; }

void StatusPage::request_stop(std::uint64_t deadline_ns) {
  StatusLayout& page = writeable();
  // The deadline first: who sees the request also sees until when.
  store(page.stop_deadline_ns, deadline_ns, std::memory_order_relaxed);
  store(page.stop_requested_ns, monotonic_ns(), std::memory_order_release);
}

StatusSnapshot StatusPage::snapshot() const {
  StatusLayout& page = readable();
  StatusSnapshot copy;
  copy.rank = page.rank;
  copy.phase = load(page.phase, std::memory_order_acquire);
  copy.pid = load(page.pid, std::memory_order_acquire);
  copy.started_ns = load(page.started_ns, std::memory_order_relaxed);
  copy.heartbeat_ns = load(page.heartbeat_ns, std::memory_order_relaxed);

  constexpr auto acquire = std::memory_order_acquire;
  const bool progress = read_section(page.progress_lock, [&] {
    copy.step = load(page.step, acquire);
    copy.samples = load(page.samples, acquire);
    copy.step_ns = load(page.step_ns, acquire);
  });
  OperationName words;
  const bool collective = read_section(page.collective_lock, [&] {
    copy.collective_seq = load(page.collective_seq, acquire);
    copy.bytes = load(page.bytes, acquire);
    copy.collective_enter_ns = load(page.collective_enter_ns, acquire);
    copy.group_sequence = load(page.group_sequence, acquire);
    for (std::size_t i = 0; i < words.size(); ++i) {
      words[i] = load(page.operation[i], acquire);
    }
  });
  copy.operation = unpack(words);
  copy.consistent = progress && collective;

  copy.stop_requested_ns = load(page.stop_requested_ns, acquire);
  copy.stop_deadline_ns = load(page.stop_deadline_ns, std::memory_order_relaxed);
  copy.collective_phase = load(page.collective_phase, std::memory_order_relaxed);
  copy.waiting_for = load(page.waiting_for, std::memory_order_relaxed);
  copy.collective_waits_ns = load(page.collective_waits_ns, std::memory_order_relaxed);
  return copy;
}

}  // namespace launcher
