// What goes over the sockets between two ranks, and how a message that cannot be carried is told.
//
// Two kinds of connection: the *control* connection of a pair carries calls (short messages that say what is called,
// with what fits beside it) and notices; its *streams* carry everything long, cut into pieces that go round the streams
// in a fixed pattern. Every piece has a Frame before it. Numbers are little-endian, as all machines that run this are.
#ifndef LAUNCHER_CROSSING_FRAME_H
#define LAUNCHER_CROSSING_FRAME_H

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace launcher::crossing {

static_assert(std::endian::native == std::endian::little);

// As launcher/collectives/crossing.py numbers them.
enum class Lane : std::uint32_t { calls = 1, notices = 2, data = 3, results = 4, rows = 5 };
inline constexpr std::uint32_t kLanes = 6;

struct Frame {
  std::uint32_t lane = 0;
  std::uint32_t flags = 0;     // of a notice: kOrderly
  std::uint64_t sequence = 0;  // of the message, in its lane, from 0
  std::uint64_t offset = 0;    // of this piece in the message
  std::uint64_t total = 0;     // bytes of the message
};
static_assert(sizeof(Frame) == 32);
inline constexpr std::uint32_t kOrderly = 1;

// Longer messages are cut into pieces of this size. It stays in the cache between the kernel's copy and the fold.
inline constexpr std::size_t kPieceBytes = 128 * 1024;
// Of a call beside its header (Header), and of a notice.
inline constexpr std::size_t kCallBytes = 64 * 1024;
inline constexpr std::size_t kNoticeBytes = 1024;

// Says what is called; all members of a group must say the same. crossing.py's HEADER.
struct Header {
  std::uint64_t sequence = 0;
  std::uint8_t operation = 0;
  std::uint8_t dtype = 0;
  std::uint8_t op = 0;
  std::uint8_t unused = 0;
  std::uint32_t root = 0;
  std::uint64_t count = 0;
  std::uint64_t second = 0;
};
static_assert(sizeof(Header) == 32);

constexpr std::size_t piece_at(const Frame& frame) noexcept {
  return static_cast<std::size_t>(std::min<std::uint64_t>(kPieceBytes, frame.total - frame.offset));
}

enum class Kind : std::uint8_t {
  lost,         // the peer's process or host is gone
  timeout,      // nothing came in time
  mismatch,     // the peer sends what was not called for
  notice,       // the peer has said why it gave the group up
  left,         // another thread of this rank gave it up
  closed,       // the leg was closed before
  interrupted,  // this rank's own caller asked to stop waiting
  system,       // the operating system refused something
};

class LegFailure : public std::runtime_error {
 public:
  LegFailure(int peer, Kind kind, const std::string& text) : std::runtime_error(text), peer_(peer), kind_(kind) {}
  int peer() const noexcept { return peer_; }  // rank in the group; -1: not known
  Kind kind() const noexcept { return kind_; }

 private:
  int peer_;
  Kind kind_;
};

// The peer has called something else.
class CallMismatch : public std::runtime_error {
 public:
  CallMismatch(int peer, const Header& theirs) : std::runtime_error("another call"), peer_(peer), theirs_(theirs) {}
  int peer() const noexcept { return peer_; }
  const Header& theirs() const noexcept { return theirs_; }

 private:
  int peer_;
  Header theirs_;
};

}  // namespace launcher::crossing

#endif
