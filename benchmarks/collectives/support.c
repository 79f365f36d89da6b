// What the benchmark needs beside Python: a barrier that belongs to no contender, the ping-pong between two cores, and
// the loops that tell what the memory gives. Compiled when the benchmark starts: cc -O3 -march=native -shared -fPIC.
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum { kMostRanks = 64, kLine = 32 };  // a flag has 128 bytes of its own

// A page that all ranks map, zero when it is made.
struct page {
  volatile uint32_t flags[kMostRanks][kLine];  // of the barrier: how many barriers the rank has reached
  volatile uint32_t ping[2][kLine];
  volatile int64_t word;  // what rank 0 tells the others between two barriers
};

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void wait_for(volatile uint32_t* flag, uint32_t value, int spin) {
  for (int polls = 0; (int32_t)(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - value) < 0; ++polls) {
    if (polls < spin) {
      __builtin_ia32_pause();
    } else {
      sched_yield();
    }
  }
}

size_t page_bytes(void) { return sizeof(struct page); }

// spin: polls before the core is given away; with more ranks than cores, few.
void barrier(struct page* page, int rank, int size, int spin) {
  const uint32_t next = page->flags[rank][0] + 1;
  __atomic_store_n(&page->flags[rank][0], next, __ATOMIC_RELEASE);
  for (int other = 0; other < size; ++other) wait_for(&page->flags[other][0], next, spin);
}

void tell(struct page* page, int64_t value) { page->word = value; }
int64_t told(struct page* page) { return page->word; }

// One-way time of a flag between the cores of ranks 0 and 1, ns: best of `batches` means over `trips` round trips.
double ping(struct page* page, int rank, int batches, int trips) {
  double best = 1e18;
  uint32_t number = page->ping[rank][0];  // where both ended last time
  for (int batch = 0; batch < batches; ++batch) {
    const int64_t begin = now_ns();
    for (int trip = 0; trip < trips; ++trip) {
      ++number;
      if (rank == 0) {
        __atomic_store_n(&page->ping[0][0], number, __ATOMIC_RELEASE);
        wait_for(&page->ping[1][0], number, 1 << 20);
      } else {
        wait_for(&page->ping[0][0], number, 1 << 20);
        __atomic_store_n(&page->ping[1][0], number, __ATOMIC_RELEASE);
      }
    }
    const double mean = (double)(now_ns() - begin) / trips / 2;
    if (mean < best) best = mean;
  }
  return best;
}

static inline void add_part(float* restrict a, float* restrict b, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const float sum = a[i] + b[i];
    a[i] = sum;
    b[i] = sum;
  }
}

// The loads and stores of an allreduce of two buffers in place, and nothing else: a, b <- a + b. In four places at a
// time, 64 KiB together, which is faster than one where lines come from another core.
void add_both(float* restrict a, float* restrict b, size_t count) {
  enum { kPlaces = 4, kStretch = 16384, kLeast = 4096, kStagger = 80, kStep = 64 };
  size_t at = 0;
  while (count - at >= kLeast) {
    const size_t stretch = count - at < kStretch ? count - at : kStretch;
    const size_t part = (stretch / kPlaces - kStagger) / kStep * kStep;
    for (size_t i = 0; i < part; i += kStep) {
      for (size_t place = 0; place < kPlaces; ++place) {
        add_part(a + at + place * part + i, b + at + place * part + i, kStep);
      }
    }
    at += kPlaces * part;
  }
  add_part(a + at, b + at, count - at);
}

// Writes a buffer with ordinary stores, as whoever computes a gradient does. bytes: a multiple of 4.
void fill(volatile uint32_t* target, uint32_t pattern, size_t bytes) {
  uint32_t* to = (uint32_t*)target;
  for (size_t i = 0; i < bytes / 4; ++i) to[i] = pattern;
}
