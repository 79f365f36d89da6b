#include "fault.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "error.h"

namespace launcher::data {
namespace {

// Linux allows 65,530 mappings a process by default (vm.max_map_count): this is a part of them. Files beyond are read.
constexpr std::size_t kRegions = 16384;
// Pages of a region that are replaced one by one; the next fault gives up all that comes after it, because each
// replaced page may cost a mapping.
constexpr std::size_t kLostPages = 16;

struct Region {
  std::atomic<std::uintptr_t> begin{0};  // 0: free
  std::atomic<std::uint64_t> bytes{0};   // rounded up to whole pages
  std::array<std::atomic<std::uint64_t>, kLostPages> lost{};
  std::atomic<std::uint32_t> lost_count{0};  // may be more than there is room for
  std::atomic<std::uint64_t> lost_from{0};
};

// All zeros, so that it takes no memory until regions are used.
constinit std::array<Region, kRegions> regions{};
constinit std::atomic<std::size_t> regions_used{0};  // no region at or above was ever used
constinit std::atomic<std::uint64_t> faults{0};
constinit std::atomic<bool> passing_on{false}, passed_on{false};
constinit std::mutex table;
std::size_t first_free = 0;  // no region below is free
struct sigaction before = {};
std::uintptr_t page_bytes = 4096;

void lower(std::atomic<std::uint64_t>& value, std::uint64_t candidate) noexcept {
  std::uint64_t now = value.load();
  while (candidate < now && !value.compare_exchange_weak(now, candidate)) {
  }
}

// In a signal handler: atomics and system calls only.
bool replace(std::uintptr_t address) noexcept {
  const std::size_t used = regions_used.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < used; ++i) {
    Region& region = regions[i];
    const std::uintptr_t begin = region.begin.load(std::memory_order_acquire);
    const std::uint64_t bytes = region.bytes.load(std::memory_order_acquire);
    // The second look: `bytes` may be of the next user of this place.
    if (begin == 0 || address < begin || address - begin >= bytes || region.begin.load() != begin) {
      continue;
    }
    const std::uint64_t offset = (address - begin) / page_bytes * page_bytes;
    // Noted before the zeros can be seen: who reads them finds the note.
    const std::uint32_t place = region.lost_count.fetch_add(1);
    std::uint64_t length = page_bytes;
    if (place < kLostPages) {
      region.lost[place].store(offset);
    } else {
      lower(region.lost_from, offset);
      length = bytes - offset;
    }
    faults.fetch_add(1);
    // Not mmap(), which a sanitizer replaces by what must not be called here.
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return syscall(SYS_mmap, begin + offset, length, long{PROT_READ}, long{kFlags}, -1L, 0L) != -1;
  }
  return false;
}

void end_by_default() noexcept {
  struct sigaction plain = {};
  plain.sa_handler = SIG_DFL;
  sigaction(SIGBUS, &plain, nullptr);
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  // si_code above 0: the kernel's, with an address; else a signal that some process has sent.
  if (info->si_code > 0 && replace(reinterpret_cast<std::uintptr_t>(info->si_addr))) {
    return;
  }
  // A handler that the signal is passed to may restore ours and raise it again (faulthandler does): once is enough.
  const bool raised_again = info->si_code <= 0 && info->si_pid == getpid() && passed_on;
  const bool nobody =
      (before.sa_flags & SA_SIGINFO) == 0 && (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN);
  if (raised_again || nobody || passing_on.exchange(true)) {
    end_by_default();
    if (info->si_code <= 0) {
      raise(number);  // delivered when this handler returns; what the kernel sent comes again by itself
    }
    return;
  }
  passed_on = true;
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(number, info, context);
  } else {
    before.sa_handler(number);
  }
  passing_on.store(false);
}

// Called with the table locked. Again for each region: a handler that was installed after ours is put behind it.
void install() noexcept {
  struct sigaction now = {};
  if (sigaction(SIGBUS, nullptr, &now) != 0 || ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_bus_error)) {
    return;
  }
  page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  before = now;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

std::uint64_t file_faults() noexcept { return faults.load(std::memory_order_acquire); }

std::size_t watch_region(const std::byte* begin, std::uint64_t bytes) noexcept {
  const std::lock_guard lock(table);
  install();
  const std::size_t used = regions_used.load(std::memory_order_relaxed);
  std::size_t i = first_free;
  while (i < used && regions[i].begin.load(std::memory_order_relaxed) != 0) {
    ++i;
  }
  first_free = std::min(i + 1, kRegions);
  if (i == kRegions) {
    return kNoRegion;
  }
  Region& region = regions[i];
  region.lost_count.store(0);
  for (auto& page : region.lost) {
    page.store(kNowhere);
  }
  region.lost_from.store(kNowhere);
  region.bytes.store((bytes + page_bytes - 1) / page_bytes * page_bytes);
  region.begin.store(reinterpret_cast<std::uintptr_t>(begin), std::memory_order_release);
  regions_used.store(std::max(used, i + 1), std::memory_order_release);
  return i;
}

void watch_again() noexcept {
  const std::lock_guard lock(table);
  install();
}

void forget_region(std::size_t region) noexcept {
  const std::lock_guard lock(table);
  regions[region].begin.store(0, std::memory_order_release);
  first_free = std::min(first_free, region);
}

std::uint64_t lost_byte(std::size_t region, std::uint64_t offset, std::uint64_t bytes) noexcept {
  Region& one = regions[region];
  std::uint64_t first = kNowhere;
  const auto consider = [&](std::uint64_t begin, std::uint64_t end) {
    const std::uint64_t at = std::max(begin, offset);
    if (bytes != 0 && at < end && at - offset < bytes) {
      first = std::min(first, at);
    }
  };
  const std::size_t count = std::min<std::size_t>(one.lost_count.load(std::memory_order_acquire), kLostPages);
  for (std::size_t i = 0; i < count; ++i) {
    if (const std::uint64_t page = one.lost[i].load(); page != kNowhere) {
      consider(page, page + page_bytes);
    }
  }
  consider(one.lost_from.load(), kNowhere);
  return first;
}

}  // namespace launcher::data
