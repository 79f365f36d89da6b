// The memory that the ranks of a group share: who has entered which call, how far each has come, and the slots that
// data passes through.
//
//   Header | Place of rank 0 | Place of rank 1 | ... | counts of each rank | slots of rank 0 | slots of rank 1 | ...
//
// Each flag has one writer and any number of readers, and only grows (modulo 2^32). A rank's slots are written by that
// rank, and in an allreduce by the ranks that return results to it.
#ifndef LAUNCHER_COLLECTIVES_SEGMENT_H
#define LAUNCHER_COLLECTIVES_SEGMENT_H

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "launcher/collectives.h"
#include "system.h"

namespace launcher::collectives {

inline constexpr std::uint32_t kSegmentMagic = 0x4c43'4732;  // "LCG2": another layout is another number
inline constexpr std::size_t kLine = 128;                    // two lines: prefetchers fetch them in pairs
inline constexpr std::size_t kFirstSlots = 2;  // for the first block of a call, by the parity of its number
inline constexpr std::size_t kRingSlots = 4;   // for the blocks after it; why 4: see pipeline.h
inline constexpr int kMaxRanks = 240;          // descriptors that fit in one message (SCM_MAX_FD is 253)

struct Flag {
  std::atomic<std::uint32_t> value{0};
  std::atomic<std::uint32_t> sleepers{0};  // how many sleep in a futex until `value` changes
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free);

// Memory of a rank that others may map: number of the registration there and offset in it. 0: not registered.
struct Region {
  std::uint32_t id = 0;
  std::uint64_t offset = 0;
};

// What a rank says when it enters a call. Written before the flag beside it, read after it, valid until the rank enters
// the call after the next one, which it can not before all others have entered the next.
struct Call {
  std::uint8_t operation = 0;
  std::uint8_t dtype = 0;
  std::uint8_t reduce_op = 0;
  std::uint8_t path = 0;  // the one that this rank can take
  std::int32_t root = 0;
  std::uint64_t count = 0;
  std::uint64_t detail = 0;  // of counts that must agree: a digest; of all_to_all: the largest
  double pre = 1.0;
  double post = 1.0;
  Region source;
  Region target;
  std::uint64_t source_address = 0;  // in the rank's own address space
  std::uint32_t measured_ns = 0;     // what the rank measured last; 0: nothing (tuner.h)
  std::uint8_t measured_class = 0;
  std::uint8_t measured_choice = 0;
  std::uint8_t choice = 0;  // of the tuner's, in this call
};

struct alignas(kLine) Entry {
  Flag flag;  // number of the call that `call` describes
  Call call;
};
static_assert(sizeof(Entry) == kLine);

enum class Presence : std::uint32_t { absent = 0, present = 1, left = 2 };

struct alignas(kLine) Place {
  Entry entries[2];  // by the parity of the call's number
  alignas(kLine) Flag stage;
  // For the eyes of others when something is wrong.
  alignas(kLine) std::atomic<std::uint64_t> entered{0};  // number of the last call << 8 | operation
  std::atomic<std::uint64_t> finished{0};                // number of the last call that returned
  std::atomic<std::uint32_t> presence{0};
  std::atomic<std::uint32_t> messages{0};  // sent to this rank's inbox so far
  std::atomic<std::uint32_t> can_pull{0};
  std::atomic<std::uint32_t> can_fence{0};
  std::atomic<std::uint64_t> probe_address{0};
  alignas(kLine) cpu_set_t cores;
};

struct alignas(kLine) Header {
  std::uint32_t magic = kSegmentMagic;
  std::uint32_t size = 0;
  std::uint64_t slot_bytes = 0;
  // The end of the group: the first rank that finds a reason writes it.
  alignas(kLine) std::atomic<std::uint32_t> ended{0};  // 0 no, 1 being written, 2 yes
  std::uint32_t failure = 0;
  std::int32_t culprit = -1;  // rank in the group
  char reason[768] = {};
};

// Where things lie; the mapping is shared by all groups of one process that were made as threads.
class Segment {
 public:
  static std::size_t bytes_for(int size, std::size_t slot_bytes) noexcept;
  static Descriptor create(int size, std::size_t slot_bytes);  // with its header written

  explicit Segment(const Descriptor& memory, std::size_t bytes);

  Header& header() const noexcept { return *reinterpret_cast<Header*>(mapping_.address()); }
  int size() const noexcept { return static_cast<int>(size_); }
  // Ends the group; false: another rank has done so first. Who sleeps is not woken.
  bool end(Failure failure, int culprit, const std::string& reason) const noexcept;
  std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  Place& place(int rank) const noexcept {
    return *reinterpret_cast<Place*>(mapping_.address() + sizeof(Header) +
                                     static_cast<std::size_t>(rank) * sizeof(Place));
  }
  // all_to_all: how many elements `rank` sends to each, in calls of this parity.
  std::uint64_t* counts(int rank, std::size_t parity) const noexcept;
  std::byte* slot(int rank, std::size_t index) const noexcept {
    return mapping_.address() + slots_ +
           (static_cast<std::size_t>(rank) * (kFirstSlots + kRingSlots) + index) * slot_bytes_;
  }

 private:
  Mapping mapping_;
  std::size_t size_;
  std::size_t slot_bytes_;
  std::size_t slots_;
};

}  // namespace launcher::collectives

#endif
