// Messages from one process to another through memory that both map: one writes, one reads.
//
// The memory has no name (memfd): nothing to clean up after a process that is killed, and not bound by the size of
// /dev/shm. The bytes behind its header are mapped twice, one copy behind the other, so that a message that goes over
// the end of the ring is still in one piece. Who waits sleeps in poll() on the socket that joins the two processes: the
// other side sends a byte on it to wake it, and its end of the socket is closed when that process ends.
#ifndef LAUNCHER_DATA_RING_H
#define LAUNCHER_DATA_RING_H

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "launcher/descriptor.h"

namespace launcher::data {

inline constexpr std::uint32_t kRingMagic = 0x4c44'5231;  // "LDR1": another layout is another number

enum class MessageKind : std::uint32_t {
  begin = 1,   // of an epoch; a: its number. The payload is the stream's first record, behind its heading.
  part = 2,    // of a payload that is larger than a message may be
  record = 3,  // a: its offset in the stream, b: its number in it
  commit = 4,  // the records before it are a batch; a: the step, b: their number
  end = 5,     // of the epoch; a: the steps it had
  error = 6,   // a: offset, b: record; flags: the problem; the payload is the file, a NUL and the text
};
inline constexpr std::uint32_t kPadding = 1;  // flag of a record: its row is masked

struct Message {
  MessageKind kind;
  std::uint32_t flags = 0;
  std::uint64_t run = 0;    // which epoch it belongs to: the dealer's first, second, ...
  std::uint64_t bytes = 0;  // of the payload that follows, filled up to a multiple of 8
  std::uint64_t a = 0, b = 0;
};
static_assert(sizeof(Message) == 40);

constexpr std::size_t message_bytes(std::size_t payload) noexcept { return sizeof(Message) + (payload + 7) / 8 * 8; }

class Ring {
 public:
  // Memory for a ring of at least `bytes`. Throws std::system_error.
  static Descriptor create(std::size_t bytes);

  // Maps it. Throws std::system_error, std::invalid_argument: this is no ring.
  explicit Ring(int memory);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring();

  std::size_t capacity() const noexcept { return capacity_; }

  // The writer's:
  bool has_room(std::size_t bytes) noexcept;
  std::byte* written() noexcept { return data_ + (head_ & (capacity_ - 1)); }  // where the next message goes
  void append(std::size_t bytes) noexcept { head_ += bytes; }  // they were written; the reader does not see them yet
  bool publish() noexcept;  // shows it all of them; true: it sleeps and is to be woken, which is told once
  void announce_writer_sleep(bool sleeps) noexcept;

  // The reader's:
  const std::byte* next() noexcept;  // the next message; nullptr: there is none
  std::size_t available() const noexcept { return static_cast<std::size_t>(seen_ - tail_); }
  void release(std::size_t bytes) noexcept;
  bool writer_sleeps() noexcept;
  void announce_reader_sleep(bool sleeps) noexcept;

 private:
  struct Header;

  Header* header_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;  // a power of two
  std::uint64_t head_ = 0;    // bytes written so far, the writer's own
  std::uint64_t tail_ = 0;    // bytes released so far, the reader's own
  std::uint64_t seen_ = 0;    // what was last seen of the other side's
};

// A byte that wakes who sleeps on the other end of a socket; one that is not read yet does as well.
void knock(int socket) noexcept;
// Takes in the knocks. False: the other end is closed.
bool answer(int socket) noexcept;

}  // namespace launcher::data

#endif
