// Mixes the records of a stream inside a window that moves along with it.
#ifndef LAUNCHER_DATA_SHUFFLE_WINDOW_H
#define LAUNCHER_DATA_SHUFFLE_WINDOW_H

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace launcher::data {

struct StreamRecord {
  std::span<const std::byte> bytes;  // with the frame
  std::uint64_t offset = 0;          // in the stream
  std::uint64_t number = 0;          // in the stream
};

// Holds up to `records` records, or `bytes` bytes of them; each one that comes takes the place of one drawn at random.
// What comes out in which order is a function of the stream, `seed`, `epoch` and the two sizes alone.
class ShuffleWindow {
 public:
  ShuffleWindow(std::size_t records, std::size_t bytes, std::uint64_t seed, std::uint64_t epoch);

  template <typename Deal>
  bool push(const StreamRecord& record, Deal deal) {  // false as soon as deal() is
    while (used_ == most_records_ || (used_ != 0 && held_bytes_ + record.bytes.size() > most_bytes_)) {
      if (!deal_one(deal)) {
        return false;
      }
    }
    hold(record);
    return true;
  }
  template <typename Deal>
  bool drain(Deal deal) {
    while (used_ != 0) {
      if (!deal_one(deal)) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Held {
    std::vector<std::byte> bytes;
    std::uint64_t offset, number;
  };

  std::uint64_t draw(std::uint64_t below) noexcept;
  void hold(const StreamRecord& record);

  template <typename Deal>
  bool deal_one(Deal& deal) {
    Held& drawn = held_[draw(used_)];
    const bool more = deal(StreamRecord{drawn.bytes, drawn.offset, drawn.number});
    held_bytes_ -= drawn.bytes.size();
    std::swap(drawn, held_[--used_]);  // its memory is for one that comes later
    return more;
  }

  std::size_t most_records_, most_bytes_;
  std::uint64_t state_;
  std::vector<Held> held_;  // of which `used_` are in use
  std::size_t used_ = 0, held_bytes_ = 0;
};

}  // namespace launcher::data

#endif
