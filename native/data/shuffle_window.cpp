#include "shuffle_window.h"

namespace launcher::data {
namespace {

// SplitMix64: G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
std::uint64_t next_of(std::uint64_t& state) noexcept {
  state += 0x9e3779b97f4a7c15U;
  std::uint64_t mixed = state;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9U;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebU;
  return mixed ^ (mixed >> 31);
}

}  // namespace

ShuffleWindow::ShuffleWindow(std::size_t records, std::size_t bytes, std::uint64_t seed, std::uint64_t epoch)
    : most_records_(records), most_bytes_(bytes), state_(seed) {
  state_ = next_of(state_) ^ epoch;
}

// Without bias: draws that would favour some numbers are drawn again.
std::uint64_t ShuffleWindow::draw(std::uint64_t below) noexcept {
  const std::uint64_t unfair = (0 - below) % below;  // 2^64 modulo `below`
  std::uint64_t value;
  do {
    value = next_of(state_);
  } while (value < unfair);
  return value % below;
}

void ShuffleWindow::hold(const StreamRecord& record) {
  if (used_ == held_.size()) {
    held_.emplace_back();
  }
  Held& held = held_[used_++];
  held.bytes.assign(record.bytes.begin(), record.bytes.end());
  held.offset = record.offset;
  held.number = record.number;
  held_bytes_ += record.bytes.size();
}

}  // namespace launcher::data
