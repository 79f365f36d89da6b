// Reads the stream of a Pipe channel for all ranks of a host, and deals its records out to them.
//
// A byte of a FIFO is delivered once: two ranks that read the same one tear its records apart. So one process reads and
// frames; each rank takes the frames of its batches from a ring of its own and decodes them itself. Step s of `world`
// ranks covers the records s * G .. (s + 1) * G of the stream, G = world * batch; the rank at place r has those from
// r * batch on. Records are passed on as they come, but a step is told (commit) only when it is complete on all ranks:
// so all of them see the same number of steps, whatever the stream's length.
#ifndef LAUNCHER_DATA_DEALER_H
#define LAUNCHER_DATA_DEALER_H

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "batch.h"
#include "framing.h"
#include "pipe.h"
#include "ring.h"
#include "share.h"
#include "shuffle_window.h"

namespace launcher::data {

struct DealerOptions {
  std::uint64_t batch = 1;
  std::uint64_t world = 1;  // ranks that share the records of this stream
  std::uint64_t first = 0;  // place of this host's first rank among them; the others follow it
  Tail tail = Tail::drop;
  std::size_t window = 1;  // records to shuffle among; 1: none
  std::size_t window_bytes = std::size_t{256} << 20;
  std::uint64_t seed = 0;
  std::function<std::unique_ptr<Framer>()> make_framer;
  // Called before a step is told to the ranks, from the dealer's thread: whether it takes place, given that this host
  // has records for it or not. May be empty: it does where it has. May throw.
  std::function<bool(std::uint64_t step, bool ready)> agree;
};

struct DealerStatistics {
  std::uint64_t records = 0, bytes = 0;  // of the stream, since the dealer was made
  std::uint64_t input_ns = 0;            // waited for the stream
  std::uint64_t room_ns = 0;             // waited for ranks to take what is theirs
};

class Dealer {
 public:
  struct Outlet {
    Descriptor ring, socket;
  };

  // One outlet for each rank of this host. Throws std::system_error, std::invalid_argument.
  Dealer(DealerOptions options, std::vector<Outlet> outlets);
  Dealer(const Dealer&) = delete;
  Dealer& operator=(const Dealer&) = delete;
  ~Dealer();  // as close()

  // Begins to deal an epoch, less its first `skip` records; the one before it is left where it is. In a forked child:
  // std::logic_error. Throws std::system_error.
  void start(std::unique_ptr<ByteStream> stream, std::string file, std::uint64_t epoch, std::uint64_t skip);
  // In place of start(): tells the ranks that this epoch can not be begun, and why.
  void refuse(const DataError& error);
  // Stops reading and closes the stream; what was dealt stays with the ranks.
  void stop() noexcept;
  // Also ends the waits of the ranks, once they have taken what was dealt.
  void close() noexcept;
  DealerStatistics statistics() const noexcept;

 private:
  struct Line {  // to one rank
    Line(int memory, Descriptor connection) : ring(memory), socket(std::move(connection)) {}
    Ring ring;
    Descriptor socket;
    std::size_t quiet = 0;  // bytes that it was not shown yet
    bool gone = false;      // its process, or its end of the socket
  };
  struct Heading {  // of a message
    MessageKind kind;
    std::uint32_t flags = 0;
    std::uint64_t a = 0, b = 0;
  };
  struct Epoch;

  void run(std::unique_ptr<ByteStream> stream, const std::string& file, std::uint64_t epoch, std::uint64_t skip);
  void read_all(ByteStream& stream, Epoch& epoch);
  bool deal(const StreamRecord& record, Epoch& epoch);
  void finish(Epoch& epoch);
  bool settle(Epoch& epoch, bool ready, std::uint64_t count);
  bool write_parts(Line& line, const Heading& heading, std::span<const std::byte> payload);
  bool write(Line& line, const Heading& heading, std::span<const std::byte> payload);
  bool write_all(const Heading& heading, std::span<const std::byte> payload = {});
  void write_error(const DataError& error);
  bool wait_for_room(Line& line, std::size_t bytes);
  void wake(Line& line) noexcept;
  void wake_readers() noexcept;
  void check_process() const;

  DealerOptions options_;
  std::vector<std::unique_ptr<Line>> lines_;
  Descriptor stop_;  // an eventfd
  std::thread thread_;
  int process_;
  std::uint64_t run_ = 0;  // epochs that were started
  std::atomic<std::uint64_t> records_{0}, bytes_{0}, input_ns_{0}, room_ns_{0};
};

}  // namespace launcher::data

#endif
