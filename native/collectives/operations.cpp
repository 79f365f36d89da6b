// The operations beside allreduce.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "local_group.h"

namespace launcher::collectives {
namespace {

// FNV-1a over the counts: they must be the same on all ranks.
std::uint64_t digest(std::span<const std::size_t> counts) noexcept {
  std::uint64_t hash = 0xcbf2'9ce4'8422'2325U;
  for (const std::size_t count : counts) {
    hash = (hash ^ count) * 0x0000'0100'0000'01b3U;
  }
  return hash;
}

std::size_t check_counts(std::span<const std::size_t> counts, std::size_t size, std::size_t element, const char* what) {
  if (counts.size() != size) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(counts.size()) + " counts for " +
                                std::to_string(size) + " ranks; expected one for each");
  }
  std::size_t total = 0;
  for (const std::size_t count : counts) {
    total = checked_sum(total, count, element);
  }
  checked_bytes(total, element);
  return total;
}

std::size_t begin_of(std::span<const std::size_t> counts, std::size_t rank) noexcept {
  std::size_t sum = 0;
  for (std::size_t index = 0; index < rank; ++index) {
    sum += counts[index];
  }
  return sum;
}

std::size_t blocks_for(std::size_t count, std::size_t length) noexcept {
  return std::max<std::size_t>(1, (count + length - 1) / length);
}

// Elements of block `block` of a part that has `count`.
std::size_t in_block(std::size_t count, std::size_t block, std::size_t length) noexcept {
  return block * length >= count ? 0 : std::min(length, count - block * length);
}

}  // namespace

void throw_too_long(std::size_t element) {
  throw std::invalid_argument("the counts make a message of more than " + std::to_string(PTRDIFF_MAX) +
                              " bytes; expected what memory can hold, in elements of " + std::to_string(element) +
                              " bytes");
}

// Block `block` of what goes to each rank, into this rank's slot: `length` elements apart.
void LocalGroup::copy_parts_in(const void* source, std::span<const std::size_t> counts, std::size_t block,
                               std::size_t length, std::size_t element) const noexcept {
  for (std::size_t other = 0, begin = 0; other < ranks(); begin += counts[other++]) {
    if (other != here()) {
      copy_bytes(my_slot(block) + other * length * element, bytes_at(source, (begin + block * length) * element),
                 in_block(counts[other], block, length) * element);
    }
  }
}

void LocalGroup::reduce_scatter(const void* source, void* target, std::span<const std::size_t> counts, DType dtype,
                                ReduceOp op, Scale scale) {
  const std::size_t element = size_of(dtype);
  const std::size_t total = check_counts(counts, ranks(), element, "reduce_scatter");
  const Fold fold = fold_of(dtype, op, scale, size());
  const std::size_t own = counts[here()];
  const std::size_t own_begin = begin_of(counts, here());
  const Member::Turn turn(member_, Operation::reduce_scatter, total * element);
  registry_.serve();
  Call call = describe(Operation::reduce_scatter, dtype, total);
  call.detail = digest(counts);
  call.reduce_op = static_cast<std::uint8_t>(op);
  call.pre = scale.pre;
  call.post = scale.post;
  Path path = Path::pipelined;
  if (may_share(total * element)) {
    call.source = registry_.find(source, total * element);
    path = call.source.id != 0 ? Path::shared : path;
  }
  // A slot holds a part of the block for each rank.
  const std::size_t length = slot_bytes() / ranks() / kUnit * kUnit / element;
  const std::size_t blocks = blocks_for(*std::max_element(counts.begin(), counts.end()), length);
  const auto in = [&](std::size_t block) { copy_parts_in(source, counts, block, length, element); };
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  const double* scales = prescales();
  if (all_take(Path::shared)) {
    for (int other = 0; other < size(); ++other) {
      sources_[static_cast<std::size_t>(other)] =
          registry_.at(other, member_.call_of(other).source) + own_begin * element;
    }
    member_.phase(CollectivePhase::reducing);
    if (own != 0) {
      reduce_one(fold, own, scales, target);
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, total * element);
    return;
  }
  take_slots(path, in);
  run_pipeline(member_, blocks, in, [&](std::size_t block) {
    const std::size_t many = in_block(own, block, length);
    if (many == 0) {
      return;
    }
    for (int other = 0; other < size(); ++other) {
      sources_[static_cast<std::size_t>(other)] = slot(other, block) + here() * length * element;
    }
    sources_[here()] = bytes_at(source, (own_begin + block * length) * element);
    reduce_one(fold, many, scales, bytes_at(target, block * length * element));
  });
  count(Path::pipelined, total * element);
}

void LocalGroup::all_gather(const void* source, void* target, std::span<const std::size_t> counts, DType dtype) {
  const std::size_t element = size_of(dtype);
  const std::size_t total = check_counts(counts, ranks(), element, "all_gather");
  const std::size_t own = counts[here()];
  const Member::Turn turn(member_, Operation::all_gather, total * element);
  registry_.serve();
  Call call = describe(Operation::all_gather, dtype, total);
  call.detail = digest(counts);
  Path path = Path::pipelined;
  if (may_share(total * element)) {
    call.source = registry_.find(source, own * element);
    path = call.source.id != 0 ? Path::shared : path;
  }
  const std::size_t length = slot_bytes() / element;
  const std::size_t blocks = blocks_for(*std::max_element(counts.begin(), counts.end()), length);
  const auto in = [&](std::size_t block) {
    copy_bytes(my_slot(block), bytes_at(source, block * length * element), in_block(own, block, length) * element);
  };
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  move(bytes_at(target, begin_of(counts, here()) * element), source, own * element);
  if (all_take(Path::shared)) {
    member_.phase(CollectivePhase::copying_out);
    for (std::size_t step = 1; step < ranks(); ++step) {
      const std::size_t other = (here() + step) % ranks();
      if (counts[other] != 0) {
        const int rank = static_cast<int>(other);
        copy_bytes(bytes_at(target, begin_of(counts, other) * element),
                   registry_.at(rank, member_.call_of(rank).source), counts[other] * element);
      }
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, total * element);
    return;
  }
  take_slots(path, in);
  run_pipeline(member_, blocks, in, [&](std::size_t block) {
    for (std::size_t other = 0, begin = 0; other < ranks(); begin += counts[other++]) {
      if (other != here()) {
        copy_bytes(bytes_at(target, (begin + block * length) * element), slot(static_cast<int>(other), block),
                   in_block(counts[other], block, length) * element);
      }
    }
  });
  count(Path::pipelined, total * element);
}

void LocalGroup::broadcast(void* buffer, std::size_t elements, DType dtype, int root) {
  check_root(root, size());
  const std::size_t bytes = checked_bytes(elements, size_of(dtype));
  const Member::Turn turn(member_, Operation::broadcast, bytes);
  registry_.serve();
  Call call = describe(Operation::broadcast, dtype, elements);
  call.root = root;
  const std::size_t length = slot_bytes();
  const auto in = [&](std::size_t block) {
    if (rank() == root) {
      copy_bytes(my_slot(block), bytes_at(buffer, block * length), in_block(bytes, block, length));
    }
  };
  Path path = Path::pipelined;
  if (rank() == root && may_share(bytes)) {
    call.source = registry_.find(buffer, bytes);
    path = call.source.id != 0 ? Path::shared : path;
  }
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  const Call& said = member_.call_of(root);
  if (said.path == static_cast<std::uint8_t>(Path::shared)) {
    member_.phase(CollectivePhase::copying_out);
    if (rank() != root) {
      copy_bytes(buffer, registry_.at(root, said.source), bytes);
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, bytes);
    return;
  }
  run_pipeline(member_, blocks_for(bytes, length), in, [&](std::size_t block) {
    if (rank() != root) {
      copy_bytes(bytes_at(buffer, block * length), slot(root, block), in_block(bytes, block, length));
    }
  });
  count(Path::pipelined, bytes);
}

void LocalGroup::reduce(const void* source, void* target, std::size_t elements, DType dtype, ReduceOp op, int root,
                        Scale scale) {
  check_root(root, size());
  const Fold fold = fold_of(dtype, op, scale, size());
  const std::size_t element = size_of(dtype);
  const std::size_t bytes = checked_bytes(elements, element);
  const Member::Turn turn(member_, Operation::reduce, bytes);
  registry_.serve();
  Call call = describe(Operation::reduce, dtype, elements);
  call.reduce_op = static_cast<std::uint8_t>(op);
  call.root = root;
  call.pre = scale.pre;
  call.post = scale.post;
  const std::size_t length = slot_bytes() / element;
  const auto in = [&](std::size_t block) {
    if (rank() != root) {
      copy_bytes(my_slot(block), bytes_at(source, block * length * element),
                 in_block(elements, block, length) * element);
    }
  };
  in(0);
  call.path = static_cast<std::uint8_t>(Path::pipelined);
  enter(call);
  const double* scales = prescales();
  run_pipeline(member_, blocks_for(elements, length), in, [&](std::size_t block) {
    const std::size_t many = in_block(elements, block, length);
    if (rank() != root || many == 0) {
      return;
    }
    for (int other = 0; other < size(); ++other) {
      sources_[static_cast<std::size_t>(other)] = slot(other, block);
    }
    sources_[here()] = bytes_at(source, block * length * element);
    reduce_one(fold, many, scales, bytes_at(target, block * length * element));
  });
  count(Path::pipelined, bytes);
}

void LocalGroup::all_to_all(const void* source, void* target, std::span<const std::size_t> send_counts,
                            std::span<const std::size_t> receive_counts, DType dtype) {
  const std::size_t element = size_of(dtype);
  const std::size_t sent = check_counts(send_counts, ranks(), element, "all_to_all (to send)");
  check_counts(receive_counts, ranks(), element, "all_to_all (to receive)");
  const Member::Turn turn(member_, Operation::all_to_all, sent * element);
  registry_.serve();
  Call call = describe(Operation::all_to_all, dtype, sent);
  call.detail = *std::max_element(send_counts.begin(), send_counts.end());
  const std::size_t parity = member_.sequence() & 1U;
  Segment& segment = member_.segment();
  std::copy(send_counts.begin(), send_counts.end(), segment.counts(rank(), parity));
  Path path = Path::pipelined;
  if (may_share(sent * element)) {
    call.source = registry_.find(source, sent * element);
    path = call.source.id != 0 ? Path::shared : path;
  }
  const std::size_t length = slot_bytes() / ranks() / kUnit * kUnit / element;
  const auto in = [&](std::size_t block) { copy_parts_in(source, send_counts, block, length, element); };
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  std::size_t most = 0;
  for (std::size_t other = 0; other < ranks(); ++other) {
    const int rank = static_cast<int>(other);
    most = std::max<std::size_t>(most, member_.call_of(rank).detail);
    const std::uint64_t comes = segment.counts(rank, parity)[here()];
    if (comes != receive_counts[other]) {
      member_.fail(Failure::mismatch, rank,
                   place_of(member_.options(), rank) + " sends " + std::to_string(comes) + " elements to " +
                       place_of(member_.options(), this->rank()) + ", which expects " +
                       std::to_string(receive_counts[other]));
    }
  }
  move(bytes_at(target, begin_of(receive_counts, here()) * element),
       bytes_at(source, begin_of(send_counts, here()) * element), send_counts[here()] * element);
  if (all_take(Path::shared)) {
    member_.phase(CollectivePhase::copying_out);
    for (std::size_t step = 1; step < ranks(); ++step) {
      const std::size_t other = (here() + step) % ranks();
      const int rank = static_cast<int>(other);
      const std::uint64_t* theirs = segment.counts(rank, parity);
      std::size_t begin = 0;
      for (std::size_t before = 0; before < here(); ++before) {
        begin += theirs[before];
      }
      copy_bytes(bytes_at(target, begin_of(receive_counts, other) * element),
                 registry_.at(rank, member_.call_of(rank).source) + begin * element, receive_counts[other] * element);
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, sent * element);
    return;
  }
  take_slots(path, in);
  run_pipeline(member_, blocks_for(most, length), in, [&](std::size_t block) {
    for (std::size_t other = 0, begin = 0; other < ranks(); begin += receive_counts[other++]) {
      if (other != here()) {
        copy_bytes(bytes_at(target, (begin + block * length) * element),
                   slot(static_cast<int>(other), block) + here() * length * element,
                   in_block(receive_counts[other], block, length) * element);
      }
    }
  });
  count(Path::pipelined, sent * element);
}

}  // namespace launcher::collectives
