// RecordIO: frames around records of any content.
//
// A frame is a magic word, a word with a flag (upper 3 bits) and a length (lower 29), so many bytes, and zeros up to a
// multiple of 4; all little-endian. A record is one frame (flag 0), or several parts: first (1), middle (2), last (3).
// Source: dmlc-core, include/dmlc/recordio.h. There are two dialects of several parts, which only differ in what joins
// them.
#ifndef LAUNCHER_DATA_RECORDIO_H
#define LAUNCHER_DATA_RECORDIO_H

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "batch.h"
#include "error.h"
#include "file.h"
#include "index.h"

namespace launcher::data {

inline constexpr std::uint32_t kRecordMagic = 0xced7230a;
inline constexpr std::size_t kFrameHeaderBytes = 8;
inline constexpr std::uint32_t kMaxPartBytes = (std::uint32_t{1} << 29) - 1;

// The numbers are part of the Python face (launcher/_data.pyi).
enum class Dialect : std::uint8_t {
  automatic = 0,  // plain where a file proves it, else dmlc
  dmlc = 1,       // a record is split where it has the magic at a multiple of 4; the reader puts the magic back
  plain = 2,      // a record is split anywhere (SageMaker's ml-io, its TensorFlow extensions); parts are concatenated
};

enum class FrameFault : std::uint8_t {
  none = 0,
  header = 1,    // the data end inside a frame's header
  payload = 2,   // they end inside a frame's payload
  parts = 3,     // they end after a part that is not the last
  magic = 4,     // no magic where a frame must begin
  flag = 5,      // a flag of 4 to 7
  sequence = 6,  // a flag that can not come here: middle or last without first, or a new record before the last part
};

// What is at the beginning of some bytes.
struct Frames {
  FrameFault fault = FrameFault::none;
  // Of the whole record, with headers and pads. With a fault: where the faulty frame begins. Of a record that goes on
  // after the bytes that are there: how many bytes it takes to know more.
  std::uint64_t bytes = 0;
  std::uint64_t payload = 0;  // the lengths of its parts, summed up
  std::uint64_t wanted = 0;   // FrameFault::payload: the length that the part's header tells
  std::uint32_t found = 0;    // FrameFault::magic: the word that is there; flag and sequence: the flag
  std::uint32_t parts = 0;    // that are whole
  bool more = false;          // the record goes on after the bytes that are there
  bool plain = false;         // proven: a part that is not the last has a length that no multiple of 4 is

  bool whole() const noexcept { return !more && fault == FrameFault::none; }
};

// The record at the beginning of `bytes`. `complete`: no bytes follow these, so that a record that goes on is a fault;
// the pad of the last frame may be missing then. Never looks past `bytes`.
Frames read_frames(std::span<const std::byte> bytes, bool complete) noexcept;

// The error for frames with a fault that begin at `begin` of a file, whose data end at `size` there.
DataError frame_error(const Frames& frames, const std::string& file, std::uint64_t begin, std::uint64_t size,
                      std::uint64_t record);

// The payload of a whole record: in place if it is of one part, else joined in `memory`. Not for Dialect::automatic.
std::span<const std::byte> payload_of(std::span<const std::byte> record, const Frames& frames, Dialect dialect,
                                      Buffer& memory);

// Finds the records of a file. `skip`: damaged places are left out and noted in the index; reading goes on at the next
// header from which on three records follow each other, or all to the end of the file. Throws DataError: truncated,
// malformed (also: Dialect::dmlc for a file that is proven to be plain).
FileIndex scan_recordio(const File& file, Dialect dialect, bool skip);

// The dialect of each file's records of several parts. Which it is is looked up when the first such record is met that
// does not tell it itself: they are rare.
class Dialects {
 public:
  Dialects(Dialect wanted, std::size_t files);
  bool automatic() const noexcept { return wanted_ == Dialect::automatic; }
  Dialect of(const Frames& frames, std::size_t number, const File& file) const;

 private:
  Dialect wanted_;
  std::shared_ptr<std::vector<std::atomic<Dialect>>> known_;  // automatic: not looked up yet
};

// The payload's length of a record that is one whole frame; none: it is not, or it is damaged.
inline std::optional<std::uint32_t> single_frame(std::span<const std::byte> record) noexcept {
  if (record.size() < kFrameHeaderBytes) {
    return std::nullopt;
  }
  std::uint32_t words[2];
  std::memcpy(words, record.data(), sizeof(words));
  if (words[0] != kRecordMagic || words[1] > kMaxPartBytes || record.size() - kFrameHeaderBytes < words[1]) {
    return std::nullopt;  // a flag other than 0 makes the word larger than any length
  }
  return words[1];
}
// The frames of a record that is not one whole frame. Throws DataError(changed) when they are not a whole record.
Frames indexed_frames(std::span<const std::byte> record, const Place& place, const File& file);

}  // namespace launcher::data

#endif
