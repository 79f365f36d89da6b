// Blocks of a message on their way through the slots.
//
// In round b a rank copies block b+1 into its slot, folds block b of all ranks (mid) and, in two phases, takes the
// result of block b-1 (out). Steps published, counted from the call's first:
//
//   one phase:   b+1 = "block b+1 is in its slot"
//   two phases:  2b+1 = "block b+1 is in its slot", 2b+2 = "block b is folded"
//
// Block 0 is put in before the call is entered and is told by the entry itself. It has two slots of its own, by the
// parity of the call: a rank that enters a call has finished the one before, so the slot of the call before that one is
// free. Blocks from 1 on take kRingSlots = 4 slots in turns. Before a rank writes block b+1 it has waited for step 2b-1
// of all, which they publish after round b-2, in which they took the last of block b-3: the slot of b-3 is free.
#ifndef LAUNCHER_COLLECTIVES_PIPELINE_H
#define LAUNCHER_COLLECTIVES_PIPELINE_H

#include "member.h"

namespace launcher::collectives {

inline std::size_t slot_of(std::uint64_t sequence, std::size_t block) noexcept {
  return block == 0 ? static_cast<std::size_t>(sequence % kFirstSlots) : kFirstSlots + (block - 1) % kRingSlots;
}

template <typename In, typename Mid>
void run_pipeline(Member& member, std::size_t blocks, In in, Mid mid) {
  const std::uint32_t base = member.steps();
  for (std::size_t b = 0; b < blocks; ++b) {
    const auto round = static_cast<std::uint32_t>(b);
    if (b > 0) {
      member.phase(CollectivePhase::waiting);
      member.wait(base + round);
    }
    if (b + 1 < blocks) {
      member.phase(CollectivePhase::copying_in);
      in(b + 1);
      member.publish(base + round + 1);
    }
    member.phase(CollectivePhase::reducing);
    mid(b);
  }
  // As many as were published: after calls of one block each, the flag must not fall behind by half of its range.
  member.skip_steps(static_cast<std::uint32_t>(blocks - 1));
}

template <typename In, typename Mid, typename Out>
void run_pipeline(Member& member, std::size_t blocks, In in, Mid mid, Out out) {
  const std::uint32_t base = member.steps();
  for (std::size_t b = 0; b < blocks; ++b) {
    const auto round = 2 * static_cast<std::uint32_t>(b);
    if (b > 0) {
      member.phase(CollectivePhase::waiting);
      member.wait(base + round - 1);
    }
    if (b + 1 < blocks) {
      member.phase(CollectivePhase::copying_in);
      in(b + 1);
      member.publish(base + round + 1);
    }
    member.phase(CollectivePhase::reducing);
    mid(b);
    member.publish(base + round + 2);
    if (b > 0) {
      member.phase(CollectivePhase::waiting);
      member.wait(base + round);
      member.phase(CollectivePhase::copying_out);
      out(b - 1);
    }
  }
  member.phase(CollectivePhase::waiting);
  member.wait(base + 2 * static_cast<std::uint32_t>(blocks));
  member.phase(CollectivePhase::copying_out);
  out(blocks - 1);
  member.skip_steps(2 * static_cast<std::uint32_t>(blocks));
}

}  // namespace launcher::collectives

#endif
