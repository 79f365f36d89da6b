// A message in pieces, addressed as one range of elements.
#ifndef LAUNCHER_COLLECTIVES_MESSAGE_H
#define LAUNCHER_COLLECTIVES_MESSAGE_H

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "kernels.h"
#include "launcher/collectives.h"

namespace launcher::collectives {

// Throws std::invalid_argument: no memory holds that much.
[[noreturn]] void throw_too_long(std::size_t element);

inline std::size_t checked_sum(std::size_t sum, std::size_t count, std::size_t element) {
  if (__builtin_add_overflow(sum, count, &sum)) {
    throw_too_long(element);
  }
  return sum;
}

// Bytes of `count` elements; an object has at most PTRDIFF_MAX.
inline std::size_t checked_bytes(std::size_t count, std::size_t element) {
  std::ptrdiff_t bytes = 0;
  if (__builtin_mul_overflow(count, element, &bytes)) {
    throw_too_long(element);
  }
  return static_cast<std::size_t>(bytes);
}

// Throws std::invalid_argument where the pieces are longer than any memory.
class Message {
 public:
  Message(std::span<const Piece> pieces, std::size_t element) : pieces_(pieces), element_(element) {
    if (pieces.size() > 1) {
      ends_.reserve(pieces.size());
      for (const Piece& piece : pieces) {
        count_ = checked_sum(count_, piece.count, element);
        ends_.push_back(count_);
      }
    } else if (!pieces.empty()) {
      count_ = pieces[0].count;
    }
    checked_bytes(count_, element);
  }

  std::size_t count() const noexcept { return count_; }

  // visit(source, target, offset from `begin` in bytes, elements) for each contiguous part of [begin, end).
  template <typename Visit>
  void each(std::size_t begin, std::size_t end, Visit visit) const {
    if (begin >= end) {
      return;
    }
    if (pieces_.size() == 1) {
      visit(from(pieces_[0].source, begin), to(pieces_[0].target, begin), std::size_t{0}, end - begin);
      return;
    }
    auto index = static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
    for (std::size_t at = begin; at < end; ++index) {
      const Piece& piece = pieces_[index];
      const std::size_t first = ends_[index] - piece.count;
      const std::size_t stop = std::min(end, ends_[index]);
      if (stop > at) {
        visit(from(piece.source, at - first), to(piece.target, at - first), (at - begin) * element_, stop - at);
        at = stop;
      }
    }
  }

  void copy_in(std::size_t begin, std::size_t end, std::byte* out) const {
    each(begin, end, [&](const std::byte* source, std::byte*, std::size_t at, std::size_t count) {
      std::memcpy(out + at, source, count * element_);
    });
  }
  // What another rank has written.
  void copy_out(std::size_t begin, std::size_t end, const std::byte* in) const {
    each(begin, end, [&](const std::byte*, std::byte* target, std::size_t at, std::size_t count) {
      copy_fresh(target, in + at, count * element_, isa());
    });
  }

 private:
  const std::byte* from(const void* base, std::size_t index) const noexcept {
    return static_cast<const std::byte*>(base) + index * element_;
  }
  std::byte* to(void* base, std::size_t index) const noexcept {
    return static_cast<std::byte*>(base) + index * element_;
  }

  std::span<const Piece> pieces_;
  std::size_t element_;
  std::size_t count_ = 0;
  std::vector<std::size_t> ends_;
};

}  // namespace launcher::collectives

#endif
