// Ways of an allreduce: in blocks through the slots, in registered buffers, by reading the peers' memory.
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "local_group.h"

namespace launcher::collectives {
namespace {

// Messages of all others together that each rank reads in one go: more, where each meeting is a change of processes.
constexpr std::size_t kSmallBytes = 1 << 10;
constexpr std::size_t kSmallBytesCrowded = 64 << 10;

// Elements of a block that are rank `share`'s to fold.
struct Share {
  std::size_t begin;
  std::size_t end;
};
Share share_of(std::size_t count, std::size_t element, std::size_t share, std::size_t size) noexcept {
  const std::size_t unit = std::max<std::size_t>(1, kUnit / element);
  const std::size_t each = ((count + size - 1) / size + unit - 1) / unit * unit;
  return {std::min(count, share * each), std::min(count, (share + 1) * each)};
}

}  // namespace

void LocalGroup::allreduce(std::span<const Piece> pieces, DType dtype, ReduceOp op, Scale scale) {
  const Fold fold = fold_of(dtype, op, scale, size());
  const std::size_t element = size_of(dtype);
  const Message message(pieces, element);
  const std::size_t bytes = message.count() * element;
  const Member::Turn turn(member_, Operation::allreduce, bytes);
  registry_.serve();
  Call call = describe(Operation::allreduce, dtype, message.count());
  call.reduce_op = static_cast<std::uint8_t>(op);
  call.pre = scale.pre;
  call.post = scale.post;

  const std::size_t few = member_.crowded() ? kSmallBytesCrowded : kSmallBytes;
  const bool fits = bytes <= slot_bytes() && (forced_ == Path::small || bytes * (ranks() - 1) <= few);
  const bool small = fits && forced_ != Path::pipelined;
  const std::size_t size_class = Tuner::class_of(bytes);
  Tuner::Pick pick = small ? Tuner::Pick{} : tuner_.next(size_class);
  Choice choice = small ? Choice{Way::one_shot, slot_bytes()} : tuner_.choice(pick.index);
  const bool may_pull = can_pull_ && pieces.size() == 1;
  if (forced_ == Path::pulled && may_pull) {
    choice.way = Way::pulled;
  } else if (choice.way == Way::pulled && (forced_ != Path::automatic || bytes < kPullBytes)) {
    pick.index = 0;
    choice = tuner_.choice(0);
  }

  Path path = small ? Path::small : Path::pipelined;
  if (pieces.size() == 1 && may_share(bytes)) {
    call.source = registry_.find(pieces[0].source, bytes);
    call.target = pieces[0].source == pieces[0].target ? call.source : registry_.find(pieces[0].target, bytes);
    if (call.source.id != 0 && call.target.id != 0) {
      path = Path::shared;
    }
  }
  if (path != Path::shared && choice.way == Way::pulled && may_pull && bytes != 0) {
    path = Path::pulled;
    call.source_address = reinterpret_cast<std::uintptr_t>(pieces[0].source);
    call.target.offset = reinterpret_cast<std::uintptr_t>(pieces[0].target);
  }
  const std::uint64_t began = pick.measured && path != Path::shared ? monotonic_ns() : 0;
  if (path == Path::small || path == Path::pipelined) {
    if (choice.way == Way::pulled) {
      pick.index = 0;  // this rank's message is in pieces; the others see it by its path
      choice = tuner_.choice(0);
    }
    member_.phase(CollectivePhase::copying_in);
    copy_in(message, element, choice, 0);
  }
  call.path = static_cast<std::uint8_t>(path);
  call.choice = static_cast<std::uint8_t>(path == Path::shared ? 0 : pick.index);
  enter(call);
  if (size() == 1) {
    allreduce_alone(pieces, fold, scale);
    count(path, bytes);
    return;
  }
  const bool agreed = all_take(path, call.choice);
  if (!agreed) {
    path = Path::pipelined;
    choice = tuner_.choice(0);
  }
  switch (path) {
    case Path::shared:
      allreduce_shared(message, element, fold);
      break;
    case Path::pulled:
      allreduce_pulled(pieces[0], element, fold);
      break;
    default:
      allreduce_in_blocks(message, element, fold, choice, !agreed);
  }
  count(path, bytes);
  if (began != 0 && agreed && forced_ == Path::automatic) {
    measured_.measured_ns =
        static_cast<std::uint32_t>(std::clamp<std::uint64_t>(monotonic_ns() - began, 1, UINT32_MAX));
    measured_.measured_class = static_cast<std::uint8_t>(size_class);
    measured_.measured_choice = static_cast<std::uint8_t>(pick.index);
  }
  if (path == Path::small) {
    prepare_slot(bytes);
  }
}

// Takes the lines of the next call's first slot from those who have read them, while nobody waits for it.
void LocalGroup::prepare_slot(std::size_t bytes) noexcept {
  const std::byte* next = member_.segment().slot(rank(), slot_of(member_.sequence() + 1, 0));
  for (std::size_t at = 0; at < std::min(bytes, kSmallBytes); at += kUnit) {
    prefetch_for_writing(next + at);
  }
}

void LocalGroup::allreduce_alone(std::span<const Piece> pieces, const Fold& fold, Scale scale) {
  const double* scales = scale.pre == 1.0 ? nullptr : &scale.pre;
  for (const Piece& piece : pieces) {
    sources_[0] = piece.source;
    reduce_one(fold, piece.count, scales, piece.target);
  }
}
void LocalGroup::copy_in(const Message& message, std::size_t element, const Choice& choice, std::size_t block) {
  const std::size_t length = choice.block / element;
  const std::size_t begin = std::min(message.count(), block * length);
  const std::size_t end = std::min(message.count(), begin + length);
  std::byte* out = my_slot(block);
  if (choice.way == Way::one_shot) {
    message.copy_in(begin, end, out);
    return;
  }
  const Share own = share_of(end - begin, element, here(), ranks());  // folded from where it is
  message.copy_in(begin, begin + own.begin, out);
  message.copy_in(begin + own.end, end, out + own.end * element);
}

void LocalGroup::allreduce_in_blocks(const Message& message, std::size_t element, const Fold& fold,
                                     const Choice& choice, bool late) {
  if (late) {
    copy_in(message, element, choice, 0);
    member_.meet_again();
  }
  const double* scales = prescales();
  const std::size_t length = choice.block / element;
  const std::size_t blocks = std::max<std::size_t>(1, (message.count() + length - 1) / length);
  const auto range = [&](std::size_t block) {
    const std::size_t begin = std::min(message.count(), block * length);
    return Share{begin, std::min(message.count(), begin + length)};
  };
  const auto in = [&](std::size_t block) { copy_in(message, element, choice, block); };
  const auto slots_at = [&](std::size_t block, std::size_t offset) {
    for (int rank = 0; rank < size(); ++rank) {
      sources_[static_cast<std::size_t>(rank)] = slot(rank, block) + offset;
    }
  };
  if (choice.way == Way::one_shot) {
    run_pipeline(member_, blocks, in, [&](std::size_t block) {
      const Share all = range(block);
      message.each(all.begin, all.end,
                   [&](const std::byte* source, std::byte* target, std::size_t at, std::size_t count) {
                     slots_at(block, at);
                     sources_[here()] = source;
                     reduce_one(fold, count, scales, target);
                   });
    });
    return;
  }
  const bool returned = choice.way == Way::returned;
  run_pipeline(
      member_, blocks, in,
      [&](std::size_t block) {
        const Share all = range(block);
        const Share own = share_of(all.end - all.begin, element, here(), ranks());
        message.each(all.begin + own.begin, all.begin + own.end,
                     [&](const std::byte* source, std::byte* target, std::size_t at, std::size_t count) {
                       const std::size_t offset = own.begin * element + at;
                       slots_at(block, offset);
                       sources_[here()] = source;
                       if (returned) {
                         for (int other = 0; other < size(); ++other) {
                           targets_[static_cast<std::size_t>(other)] = slot(other, block) + offset;
                         }
                         targets_[here()] = target;
                       } else {
                         targets_[0] = target;
                         targets_[1] = my_slot(block) + offset;
                       }
                       fold.function(targets_.data(), returned ? ranks() : 2, sources_.data(), ranks(), count, scales,
                                     fold.finish);
                     });
      },
      [&](std::size_t block) {
        const Share all = range(block);
        for (int other = 0; other < size(); ++other) {
          if (other != rank()) {
            const Share theirs = share_of(all.end - all.begin, element, static_cast<std::size_t>(other), ranks());
            message.copy_out(all.begin + theirs.begin, all.begin + theirs.end,
                             slot(returned ? rank() : other, block) + theirs.begin * element);
          }
        }
      });
}

void LocalGroup::allreduce_shared(const Message& message, std::size_t element, const Fold& fold) {
  const double* scales = prescales();
  const Share own = share_of(message.count(), element, here(), ranks());
  if (own.end > own.begin) {
    for (int rank = 0; rank < size(); ++rank) {
      const Call& call = member_.call_of(rank);
      sources_[static_cast<std::size_t>(rank)] = registry_.at(rank, call.source) + own.begin * element;
      targets_[static_cast<std::size_t>(rank)] = registry_.at(rank, call.target) + own.begin * element;
    }
    member_.phase(CollectivePhase::reducing);
    fold.function(targets_.data(), ranks(), sources_.data(), ranks(), own.end - own.begin, scales, fold.finish);
  }
  member_.phase(CollectivePhase::waiting);
  member_.meet_again();
}

void LocalGroup::pull(int rank, std::uint64_t address, void* target, std::size_t bytes) {
  std::size_t done = 0;
  while (done < bytes) {
    const iovec local{bytes_at(target, done), bytes - done};
    const iovec remote{reinterpret_cast<void*>(address + done), bytes - done};
    const ssize_t count = ::process_vm_readv(member_.process(rank).pid(), &local, 1, &remote, 1, 0);
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (errno != EINTR) {
      const int error = errno;
      if (error == ESRCH) {  // it is on its way out: its memory goes before its process is seen to have ended
        member_.lost(rank);
      }
      member_.fail(Failure::system, rank,
                   place_of(member_.options(), rank) + ": its memory could not be read: " + std::strerror(error));
    }
  }
}

void LocalGroup::allreduce_pulled(const Piece& piece, std::size_t element, const Fold& fold) {
  const double* scales = prescales();
  const Share own = share_of(piece.count, element, here(), ranks());
  const std::size_t length = kPullBytes / element;
  scratch_.resize(ranks() * kPullBytes);
  for (std::size_t at = own.begin; at < own.end; at += length) {
    const std::size_t count = std::min(length, own.end - at);
    member_.phase(CollectivePhase::copying_in);
    for (int other = 0; other < size(); ++other) {
      const auto index = static_cast<std::size_t>(other);
      if (other == rank()) {
        sources_[index] = bytes_at(piece.source, at * element);
        continue;
      }
      std::byte* out = scratch_.data() + index * kPullBytes;
      pull(other, member_.call_of(other).source_address + at * element, out, count * element);
      sources_[index] = out;
    }
    member_.phase(CollectivePhase::reducing);
    reduce_one(fold, count, scales, bytes_at(piece.target, at * element));
  }
  member_.phase(CollectivePhase::waiting);
  member_.meet_again();
  member_.phase(CollectivePhase::copying_out);
  for (int step = 1; step < size(); ++step) {
    const int other = (rank() + step) % size();  // not all from the same rank at once
    const Share theirs = share_of(piece.count, element, static_cast<std::size_t>(other), ranks());
    pull(other, member_.call_of(other).target.offset + theirs.begin * element,
         bytes_at(piece.target, theirs.begin * element), (theirs.end - theirs.begin) * element);
  }
  member_.phase(CollectivePhase::waiting);
  member_.meet_again();  // others read from this rank's buffer until here
}

}  // namespace launcher::collectives
