// Protocol buffers on the wire: a reader that goes over the bytes of one message and never past them.
// Source: protobuf.dev/programming-guides/encoding.
#ifndef LAUNCHER_DATA_WIRE_H
#define LAUNCHER_DATA_WIRE_H

#include <cstddef>
#include <cstdint>
#include <span>

namespace launcher::data {

// Thrown for bytes that are no message; who knows the file makes a DataError of it.
struct WireError {
  const std::byte* where;
  const char* what;
};

enum class WireType : std::uint8_t { varint = 0, fixed64 = 1, bytes = 2, group = 3, group_end = 4, fixed32 = 5 };

class WireReader {
 public:
  explicit WireReader(std::span<const std::byte> message) noexcept
      : at_(message.data()), end_(message.data() + message.size()) {}

  struct Tag {
    std::uint32_t field;
    WireType type;
    bool is(std::uint32_t number, WireType wanted) const noexcept { return field == number && type == wanted; }
  };

  bool done() const noexcept { return at_ == end_; }
  const std::byte* at() const noexcept { return at_; }

  std::uint64_t varint() {
    if (at_ != end_ && static_cast<std::uint8_t>(*at_) < kMore) {
      return static_cast<std::uint8_t>(*at_++);
    }
    return long_varint();
  }

  Tag tag(std::uint32_t smallest = 1) {
    const std::byte* begin = at_;
    const std::uint64_t word = varint();
    const auto type = static_cast<std::uint8_t>(word & 7);
    if (word >> 32 != 0 || at_ - begin > kMaxTagBytes || word >> 3 < smallest || type > 5) {
      throw WireError{begin, "found a field's tag that no protobuf message has"};
    }
    return {static_cast<std::uint32_t>(word >> 3), static_cast<WireType>(type)};
  }

  std::span<const std::byte> bytes() {
    const std::byte* begin = at_;
    const std::uint64_t length = varint();
    if (length > static_cast<std::uint64_t>(end_ - at_) || at_ - begin > kMaxTagBytes) {
      throw WireError{begin, "a field's length goes past the end of what it is in"};
    }
    return take(static_cast<std::size_t>(length));
  }

  // The bytes of a fixed32, fixed64, or varint.
  std::span<const std::byte> number(WireType type) {
    if (type == WireType::varint) {
      const std::byte* begin = at_;
      varint();
      return {begin, at_};
    }
    const std::size_t size = type == WireType::fixed32 ? 4 : 8;
    if (static_cast<std::size_t>(end_ - at_) < size) {
      throw WireError{at_, "a number goes past the end of what it is in"};
    }
    return take(size);
  }

  void skip(Tag tag) { skip(tag, 0); }

 private:
  static constexpr std::uint8_t kMore = 0x80;        // the bit of a varint's byte that says: another follows
  static constexpr std::ptrdiff_t kMaxTagBytes = 5;  // of a varint of 32 bits
  static constexpr int kMaxDepth = 90;  // of groups; libprotobuf's limit is 100, our messages' own included

  std::span<const std::byte> take(std::size_t size) noexcept {
    const std::byte* begin = at_;
    at_ += size;
    return {begin, size};
  }

  std::uint64_t long_varint() {
    const std::byte* begin = at_;
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 70; shift += 7) {
      if (at_ == end_) {
        throw WireError{begin, "a number goes past the end of what it is in"};
      }
      const auto byte = static_cast<std::uint8_t>(*at_++);
      value |= static_cast<std::uint64_t>(byte & (kMore - 1)) << shift;
      if (byte < kMore) {
        return value;  // bits above the 64th are dropped, as libprotobuf does
      }
    }
    throw WireError{begin, "found a number of more than 10 bytes"};
  }

  void skip(Tag tag, int depth) {
    switch (tag.type) {
      case WireType::bytes:
        bytes();
        return;
      case WireType::varint:
      case WireType::fixed32:
      case WireType::fixed64:
        number(tag.type);
        return;
      case WireType::group: {
        const std::byte* begin = at_;
        if (depth == kMaxDepth) {
          throw WireError{begin, "groups are nested too deep"};
        }
        while (!done()) {
          const Tag inner = this->tag(0);  // what is skipped may have a field 0, as libprotobuf has it
          if (inner.type == WireType::group_end) {
            if (inner.field != tag.field) {
              throw WireError{begin, "a group ends as another"};
            }
            return;
          }
          skip(inner, depth + 1);
        }
        throw WireError{begin, "a group has no end"};
      }
      case WireType::group_end:
        throw WireError{at_, "found the end of a group that has not begun"};
    }
  }

  const std::byte* at_;
  const std::byte* end_;
};

}  // namespace launcher::data

#endif
