// What the memory gives: the copying that a loader can not do without, and nothing else. One batch a call.
// Compiled when the benchmark starts: c++ -O3 -march=native -std=c++20 -shared -fPIC.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr std::size_t kRing = 4;  // batches that are written in turn, as a loader that reads ahead does
constexpr std::size_t kLine = 64;
constexpr std::size_t kLabel = 4;
constexpr std::size_t kAhead = 8;          // records
constexpr std::size_t kPrefetched = 4096;  // of a record; the processor's own prefetching does the rest

// Always inlined: to GCC a function that only prefetches does nothing, and it leaves its calls out.
[[gnu::always_inline]] inline void prefetch(const unsigned char* begin, std::size_t bytes) {
  constexpr int kForReading = 0, kSecondCache = 2;
  const std::size_t wanted = bytes < kPrefetched ? bytes : kPrefetched;
  for (std::size_t at = 0; at < wanted; at += kLine) __builtin_prefetch(begin + at, kForReading, kSecondCache);
}

}  // namespace

extern "C" {

// Where a walk over the records is. The order has `records` entries; ring has room for kRing batches.
struct Walk {
  const unsigned char* data;
  std::uint64_t stride;  // from a record to the next one
  std::uint64_t bytes;   // of a record that are copied
  std::uint64_t label;   // where 4 bytes more are that are copied, to a column of their own; 0: none
  std::uint64_t records;
  std::uint64_t batch;
  const std::uint32_t* order;
  unsigned char* ring;
  std::uint64_t at;    // in the order
  std::uint64_t turn;  // of the ring
};

std::uint64_t walk_bytes() { return sizeof(Walk); }
std::uint64_t ring_batches() { return kRing; }

static unsigned char* begin_batch(Walk* walk) {
  if (walk->at + walk->batch > walk->records) walk->at = 0;
  const std::uint64_t batch_bytes = walk->batch * (walk->bytes + (walk->label ? kLabel : 0));
  return walk->ring + walk->turn++ % kRing * batch_bytes;
}

// A batch of records in the given order, the next ones' cache lines on their way.
void gather(Walk* walk) {
  unsigned char* to = begin_batch(walk);
  const std::uint32_t* order = walk->order + walk->at;
  const std::uint64_t left = walk->records - walk->at;
  for (std::uint64_t i = 0; i < walk->batch; ++i, to += walk->bytes) {
    if (i + kAhead < left) prefetch(walk->data + order[i + kAhead] * walk->stride, walk->bytes);
    std::memcpy(to, walk->data + order[i] * walk->stride, walk->bytes);
  }
  walk->at += walk->batch;
}

// A batch of records one after the other; of a format with frames, the values and the label of each.
void copy(Walk* walk) {
  unsigned char* to = begin_batch(walk);
  const unsigned char* from = walk->data + walk->at * walk->stride;
  if (walk->stride == walk->bytes) {
    std::memcpy(to, from, walk->batch * walk->bytes);
  } else {
    unsigned char* labels = to + walk->batch * walk->bytes;
    for (std::uint64_t i = 0; i < walk->batch; ++i, from += walk->stride) {
      std::memcpy(to + i * walk->bytes, from, walk->bytes);
      std::memcpy(labels + i * kLabel, from + walk->label, kLabel);
    }
  }
  walk->at += walk->batch;
}

// Reads a file to its end through a buffer; the bytes, or -1.
std::int64_t drain(int file, unsigned char* buffer, std::uint64_t bytes) {
  std::int64_t sum = 0;
  while (true) {
    const ssize_t got = read(file, buffer, bytes);
    if (got < 0) return -1;
    if (got == 0) return sum;
    sum += got;
  }
}
}
