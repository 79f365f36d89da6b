#include "segment.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

namespace launcher::collectives {
namespace {

constexpr std::size_t kPage = 4096;

constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) noexcept {
  return (bytes + unit - 1) / unit * unit;
}

std::size_t counts_offset(std::size_t size) noexcept { return sizeof(Header) + size * sizeof(Place); }

std::size_t slots_offset(std::size_t size) noexcept {
  return round_up(counts_offset(size) + 2 * size * round_up(size * sizeof(std::uint64_t), kLine), kPage);
}

}  // namespace

std::size_t Segment::bytes_for(int size, std::size_t slot_bytes) noexcept {
  const auto ranks = static_cast<std::size_t>(size);
  return slots_offset(ranks) + ranks * (kFirstSlots + kRingSlots) * slot_bytes;
}

Descriptor Segment::create(int size, std::size_t slot_bytes) {
  const std::size_t bytes = bytes_for(size, slot_bytes);
  Descriptor memory = make_memory("launcher-group", bytes);
  const Mapping mapping(memory, bytes);
  auto* header = new (mapping.address()) Header;
  header->size = static_cast<std::uint32_t>(size);
  header->slot_bytes = slot_bytes;
  for (int rank = 0; rank < size; ++rank) {
    new (mapping.address() + sizeof(Header) + static_cast<std::size_t>(rank) * sizeof(Place)) Place;
  }
  return memory;
}

Segment::Segment(const Descriptor& memory, std::size_t bytes) : mapping_(memory, bytes) {
  if (header().magic != kSegmentMagic || bytes != bytes_for(static_cast<int>(header().size), header().slot_bytes)) {
    throw std::invalid_argument("the group's shared memory is of another build of this package");
  }
  size_ = header().size;
  slot_bytes_ = header().slot_bytes;
  slots_ = slots_offset(size_);
}

bool Segment::end(Failure failure, int culprit, const std::string& reason) const noexcept {
  Header& told = header();
  std::uint32_t open = 0;
  if (!told.ended.compare_exchange_strong(open, 1, std::memory_order_acq_rel)) {
    return false;
  }
  told.failure = static_cast<std::uint32_t>(failure);
  told.culprit = culprit;
  std::memcpy(told.reason, reason.data(), std::min(reason.size(), sizeof told.reason - 1));
  told.ended.store(2, std::memory_order_release);
  return true;
}

std::uint64_t* Segment::counts(int rank, std::size_t parity) const noexcept {
  const std::size_t stride = round_up(size_ * sizeof(std::uint64_t), kLine);
  const std::size_t index = 2 * static_cast<std::size_t>(rank) + parity;
  return reinterpret_cast<std::uint64_t*>(mapping_.address() + counts_offset(size_) + index * stride);
}

}  // namespace launcher::collectives
