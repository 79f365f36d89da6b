// Allreduce between GPUs that map each other's memory: what a rank's segment holds, who reduces what, and the kernel's
// body. Each rank has one segment that all peers map (CUDA IPC, or the same process). Three ways:
//
//   one_shot   each rank copies its input into its segment; all ranks read all segments and fold everything
//   two_shot   the same copy; rank r folds part r of the vectors into its segment; all ranks read all parts
//   in_place   the message lies in the segments themselves: rank r folds part r and writes it to all segments
//
// Every element is folded in rank order, by one rank or in the same way by all: the same bits on every rank.
//
// Ranks meet block by block: block b touches, of each part, the same vectors in every step on every rank, so it waits
// for block b of the peers only. All ranks start the same number of blocks. A flag holds the number of the call, so
// flags are never reset. The number is counted in the segment, by the kernel: a CUDA graph may replay it.
//
// Two staging areas take turns. Who writes one in call k+2 has, in call k+1, seen a flag of each peer that the peer set
// in its call k+1, which began after its call k was over (a rank's calls are in stream order): nobody reads it any
// more.
//
// A wait ends at the deadline, when a peer gave up, or when the host says so; the first to see it puts it down for the
// host and tells the peers. Nothing is written to the target then, or not all of it.
#ifndef LAUNCHER_CUDA_ALLREDUCE_H
#define LAUNCHER_CUDA_ALLREDUCE_H

#include <cstdint>

#include "numbers.h"
#include "table.h"

namespace launcher::cuda {

constexpr int kMaxRanks = kLauncherCudaMaxRanks;
constexpr std::uint32_t kMaxMeetings = 64;  // blocks of one call
constexpr std::uint32_t kReduceThreads = 512;
constexpr std::uint32_t kPatience = 64;  // looks at a flag between two looks at the clock and at the abort words

// Words that different parties write lie on different lines of 128 bytes.
struct Control {
  // Written by peers: [0] the data is there, [1] the result is there.
  std::uint32_t flags[2][kMaxMeetings][kMaxRanks];
  alignas(128) std::uint32_t abort;  // written by peers: 1 + the rank that gave up
  alignas(128) std::uint32_t calls;  // finished
  std::uint32_t blocks_done;         // of the call that runs
  std::uint32_t failed;              // 1: this rank has put a failure down
};

// In the host's memory, mapped for the GPU.
struct HostPage {
  std::uint32_t abort;               // written by the host
  alignas(128) std::uint32_t state;  // LauncherCudaState; written last
  std::uint32_t culprit;
  std::uint32_t call;
};

constexpr std::uint64_t kControlBytes = 16384;
static_assert(sizeof(Control) <= kControlBytes);

// Segment: control, staging area 0, staging area 1, shared area.
constexpr std::uint64_t kRounding = 256;
LAUNCHER_HOST_DEVICE std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

enum Step : std::uint32_t {
  kStage = 1,
  kMeet = 2,  // wait for the peers, by flags, where the kernel needs them
  kReduce = 4,
  kGather = 8,
  kAllSteps = 15,
};

struct Call {
  unsigned char* segments[kMaxRanks];  // as this rank maps them
  HostPage* host;                      // as the GPU maps it
  const void* source;
  void* target;
  std::uint64_t count;           // elements
  std::uint64_t staging_offset;  // in each segment
  std::uint64_t staging_bytes;
  std::uint64_t shared_offset;  // in_place: of the message in each segment
  std::uint64_t timeout_ns;
  double scale;
  std::uint32_t rank;
  std::uint32_t size;
  std::uint32_t op;      // ReduceOp: sum, minimum, maximum
  std::uint32_t steps;   // of Step; all but kMeet apart: several launches, ordered by the host
  std::uint32_t number;  // of the call, where the host counts; 0: counted in the segment
};

LAUNCHER_DEVICE Control& control_of(const Call& call, std::uint32_t rank) {
  return *reinterpret_cast<Control*>(call.segments[rank]);
}

// ---- vectors of 16 bytes

template <typename T>
LAUNCHER_HOST_DEVICE std::uint64_t vectors_of(std::uint64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T>;
}

// Part `part` of `size` is [part_begin(part), part_begin(part + 1)).
LAUNCHER_HOST_DEVICE std::uint64_t part_begin(std::uint64_t vectors, std::uint32_t part, std::uint32_t size) {
  const std::uint64_t each = (vectors + size - 1) / size;
  const std::uint64_t begin = each * part;
  return begin < vectors ? begin : vectors;
}

// Blocks for the longest list of vectors that a step goes through: the same on every rank.
LAUNCHER_HOST_DEVICE std::uint32_t meetings_of(std::uint64_t vectors, std::uint32_t most) {
  const std::uint64_t wanted = (vectors + kReduceThreads - 1) / kReduceThreads;
  const std::uint64_t bound = most < kMaxMeetings ? most : kMaxMeetings;
  const std::uint64_t blocks = wanted < bound ? wanted : bound;
  return blocks == 0 ? 1 : static_cast<std::uint32_t>(blocks);
}

// A thread's vectors of a part: [first, end) in steps of `step`.
struct Share {
  std::uint64_t first;
  std::uint64_t end;
  std::uint64_t step;
};

template <typename Block>
LAUNCHER_DEVICE Share share_of(const Block& block, std::uint32_t thread, std::uint64_t vectors, std::uint32_t part,
                               std::uint32_t parts) {
  const std::uint64_t begin = part_begin(vectors, part, parts);
  return {begin + static_cast<std::uint64_t>(block.index()) * block.threads() + thread,
          part_begin(vectors, part + 1, parts), static_cast<std::uint64_t>(block.count()) * block.threads()};
}

// Vector `vector` of `count` elements; what lies behind them is zero. kShared: a peer may have written them.
template <typename T, bool kShared>
LAUNCHER_DEVICE Wide load_elements(const void* source, std::uint64_t vector, std::uint64_t count, bool wide) {
  using Memory = typename T::Memory;
  constexpr std::uint64_t kCount = kLanes<T>;
  if (wide && (vector + 1) * kCount <= count) {
    const Wide* from = static_cast<const Wide*>(source) + vector;
    return kShared ? load_shared(from) : load_once(from);
  }
  Memory elements[kCount] = {};
  // volatile: not through the read-only path
  const volatile Memory* from = static_cast<const volatile Memory*>(source) + vector * kCount;
  LAUNCHER_UNROLL
  for (std::uint64_t lane = 0; lane < kCount; ++lane) {
    if (vector * kCount + lane < count) {
      elements[lane] = from[lane];
    }
  }
  Wide value;
  memcpy(&value, elements, sizeof value);
  return value;
}

template <typename T>
LAUNCHER_DEVICE void store_elements(void* target, std::uint64_t vector, std::uint64_t count, bool wide,
                                    const Wide& value) {
  using Memory = typename T::Memory;
  constexpr std::uint64_t kCount = kLanes<T>;
  if (wide && (vector + 1) * kCount <= count) {
    store(static_cast<Wide*>(target) + vector, value);
    return;
  }
  Memory elements[kCount];
  memcpy(elements, &value, sizeof value);
  Memory* to = static_cast<Memory*>(target) + vector * kCount;
  LAUNCHER_UNROLL
  for (std::uint64_t lane = 0; lane < kCount; ++lane) {
    if (vector * kCount + lane < count) {
      to[lane] = elements[lane];
    }
  }
}

template <typename T>
LAUNCHER_DEVICE Wide folded(const Wide (&values)[kMaxRanks], std::uint32_t size, ReduceOp op, double scale) {
  using Memory = typename T::Memory;
  using Scalar = typename T::Scalar;
  Memory elements[kLanes<T>];
  Scalar sums[kLanes<T>];
  memcpy(elements, &values[0], sizeof elements);
  LAUNCHER_UNROLL
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    sums[lane] = T::read(elements[lane]);
  }
  LAUNCHER_UNROLL
  for (int rank = 1; rank < kMaxRanks; ++rank) {
    if (static_cast<std::uint32_t>(rank) < size) {
      memcpy(elements, &values[rank], sizeof elements);
      LAUNCHER_UNROLL
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        sums[lane] = fold(sums[lane], T::read(elements[lane]), op);
      }
    }
  }
  LAUNCHER_UNROLL
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    elements[lane] = T::write(scaled(sums[lane], scale));
  }
  Wide value;
  memcpy(&value, elements, sizeof value);
  return value;
}

// ---- meeting the peers

// A peer is at most one call ahead: for the one after that it needs this rank's flag. Anything else is from long ago.
LAUNCHER_HOST_DEVICE bool reached(std::uint32_t flag, std::uint32_t number) { return flag - number <= 1; }

LAUNCHER_DEVICE void give_up(const Call& call, std::uint32_t number, LauncherCudaState state, std::uint32_t culprit) {
  if (exchange(&control_of(call, call.rank).failed, 1) != 0) {
    return;
  }
  store_relaxed(&call.host->culprit, culprit);
  store_relaxed(&call.host->call, number);
  store_release(&call.host->state, state);
  LAUNCHER_UNROLL
  for (int peer = 0; peer < kMaxRanks; ++peer) {
    if (static_cast<std::uint32_t>(peer) < call.size && static_cast<std::uint32_t>(peer) != call.rank) {
      store_relaxed(&control_of(call, peer).abort, 1 + call.rank);
    }
  }
}

// Until `peer` has set the flag for call `number`. False: given up.
LAUNCHER_DEVICE bool wait_for(const Call& call, const std::uint32_t* flag, std::uint32_t number, std::uint32_t peer) {
  std::uint64_t started = 0;
  for (std::uint32_t looks = 1;; ++looks) {
    if (reached(load_acquire(flag), number)) {
      return true;
    }
    between_looks();
    if (looks % kPatience != 0) {
      continue;
    }
    const std::uint32_t who = load_relaxed(&control_of(call, call.rank).abort);
    if (who != 0) {
      give_up(call, number, kLauncherCudaPeerGaveUp, who - 1);
      return false;
    }
    if (load_relaxed(&call.host->abort) != 0) {
      give_up(call, number, kLauncherCudaAborted, call.rank);
      return false;
    }
    const std::uint64_t now = now_ns();
    if (started == 0) {
      started = now;
    } else if (now - started > call.timeout_ns) {
      give_up(call, number, kLauncherCudaTimedOut, peer);
      return false;
    }
  }
}

// Tells block `block` of every peer that this one has got here, and waits until it has, too. What the peers' blocks
// have written before, this one's threads see after. False, on all threads of the block: given up.
template <typename Block>
LAUNCHER_DEVICE bool meet(Block& block, const Call& call, std::uint32_t number, int phase) {
  block.sync();
  block.each([&](std::uint32_t thread) {
    if (thread < call.size && thread != call.rank) {
      store_release(&control_of(call, thread).flags[phase][block.index()][call.rank], number);
    }
  });
  return block.all([&](std::uint32_t thread) {
    return thread >= call.size || thread == call.rank ||
           wait_for(call, &control_of(call, call.rank).flags[phase][block.index()][thread], number, thread);
  });
}

// ---- the kernel

template <typename T, LauncherCudaAlgorithm kAlgorithm, typename Block>
LAUNCHER_DEVICE void allreduce(Block& block, const Call& call) {
  constexpr bool kInPlace = kAlgorithm == kLauncherCudaInPlace;
  constexpr bool kParts = kAlgorithm != kLauncherCudaOneShot;
  Control& own = control_of(call, call.rank);
  const bool counted = call.number == 0;
  const std::uint32_t number = counted ? load_relaxed(&own.calls) + 1 : call.number;
  if (!block.all([&](std::uint32_t) { return load_relaxed(&own.failed) == 0; })) {
    return;  // an earlier call was given up: the host will find it
  }
  const bool meeting = (call.steps & kMeet) != 0;
  const std::uint64_t vectors = vectors_of<T>(call.count);
  const std::uint32_t parts = kParts ? call.size : 1;
  // Where each segment has the message. Staged, it ends in zeros; in place, others' data may follow.
  const std::uint64_t place = kInPlace ? call.shared_offset : call.staging_offset + (number & 1U) * call.staging_bytes;
  const bool wide_source = aligned(call.source, sizeof(Wide));
  const bool wide_target = aligned(call.target, sizeof(Wide));

  if (!kInPlace && (call.steps & kStage) != 0) {
    block.each([&](std::uint32_t thread) {
      Wide* staging = reinterpret_cast<Wide*>(call.segments[call.rank] + place);
      for (std::uint32_t part = 0; part < parts; ++part) {
        const Share share = share_of(block, thread, vectors, part, parts);
        for (std::uint64_t vector = share.first; vector < share.end; vector += share.step) {
          store(staging + vector, load_elements<T, false>(call.source, vector, call.count, wide_source));
        }
      }
    });
  }
  if (meeting && !meet(block, call, number, 0)) {
    return;
  }
  if ((call.steps & kReduce) != 0) {
    block.each([&](std::uint32_t thread) {
      const Share share = share_of(block, thread, vectors, kParts ? call.rank : 0, parts);
      for (std::uint64_t vector = share.first; vector < share.end; vector += share.step) {
        Wide values[kMaxRanks] = {};
        LAUNCHER_UNROLL
        for (int rank = 0; rank < kMaxRanks; ++rank) {
          if (static_cast<std::uint32_t>(rank) < call.size) {
            const unsigned char* message = call.segments[rank] + place;
            if constexpr (kInPlace) {
              values[rank] = load_elements<T, true>(message, vector, call.count, true);
            } else {
              values[rank] = load_shared(reinterpret_cast<const Wide*>(message) + vector);
            }
          }
        }
        const Wide value = folded<T>(values, call.size, static_cast<ReduceOp>(call.op), call.scale);
        if (kInPlace) {
          LAUNCHER_UNROLL
          for (int rank = 0; rank < kMaxRanks; ++rank) {
            if (static_cast<std::uint32_t>(rank) < call.size) {
              store_elements<T>(call.segments[rank] + place, vector, call.count, true, value);
            }
          }
        } else {
          if (kParts) {
            store(reinterpret_cast<Wide*>(call.segments[call.rank] + place) + vector, value);
          }
          store_elements<T>(call.target, vector, call.count, wide_target, value);
        }
      }
    });
  }
  if (kParts && meeting && !meet(block, call, number, 1)) {
    return;
  }
  if (kParts && !kInPlace && (call.steps & kGather) != 0) {
    block.each([&](std::uint32_t thread) {
      for (std::uint32_t part = 0; part < parts; ++part) {
        if (part != call.rank) {
          const Wide* staging = reinterpret_cast<const Wide*>(call.segments[part] + place);
          const Share share = share_of(block, thread, vectors, part, parts);
          for (std::uint64_t vector = share.first; vector < share.end; vector += share.step) {
            store_elements<T>(call.target, vector, call.count, wide_target, load_shared(staging + vector));
          }
        }
      }
    });
  }
  if (counted) {
    // The block that is last to end counts the call; by then every block has read the number.
    block.sync();
    block.each([&](std::uint32_t thread) {
      if (thread == 0 && fetch_add(&own.blocks_done, 1) == block.count() - 1) {
        store_relaxed(&own.blocks_done, 0);
        store_relaxed(&own.calls, number);
      }
    });
  }
}

}  // namespace launcher::cuda

#endif
