// The connections to one peer: what is on its way there and from there. Nothing here waits.
#ifndef LAUNCHER_CROSSING_LINK_H
#define LAUNCHER_CROSSING_LINK_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "frame.h"
#include "socket.h"

namespace launcher::crossing {

// A message that is being sent, or one that is awaited.
struct Request {
  int peer = -1;
  std::byte* address = nullptr;
  std::size_t bytes = 0;  // to send; room for what comes
  std::size_t left = 0;   // bytes not yet handed to the kernel, or not yet come
  bool started = false;   // of a receive: its size is known
  bool done = false;
};
using Pending = std::shared_ptr<Request>;

// The messages of one lane, in their order.
class LaneState {
 public:
  std::uint64_t next_send() noexcept { return sent_++; }
  void post(Pending request) { posted_.push_back(std::move(request)); }
  // The receive that was posted for a message; null: none yet.
  Pending find(std::uint64_t sequence) const noexcept;
  void drop_done() noexcept;
  bool waiting() const noexcept { return !posted_.empty(); }
  void clear() noexcept { posted_.clear(); }

 private:
  std::uint64_t sent_ = 0;
  std::uint64_t first_ = 0;  // number of posted_.front()
  std::deque<Pending> posted_;
};

class Link;

// One of the connections for long messages.
class Stream {
 public:
  explicit Stream(Socket socket) : socket_(std::move(socket)) {}
  int descriptor() const noexcept { return socket_.get(); }
  void queue(const Pending& request, std::uint32_t lane, std::uint64_t sequence, std::size_t offset);
  bool sending() const noexcept { return !out_.empty(); }
  // A frame lies there that nothing was posted for.
  bool stalled() const noexcept { return stalled_; }
  // The peer has closed it, and all that came before was read.
  bool ended() const noexcept { return ended_; }
  // Whether anything moved. Errors go to the link.
  bool send(Link& link);
  bool receive(Link& link);

 private:
  struct Piece {
    Pending request;
    Frame frame;
    std::size_t bytes;
  };
  // The frame is complete: where its piece goes. False: nothing was posted for it, or it makes no sense.
  bool match(Link& link);
  void finished(Link& link);

  Socket socket_;
  std::deque<Piece> out_;
  std::size_t sent_ = 0;  // of the first piece, its frame included
  Frame frame_;
  std::size_t have_ = 0;  // bytes of frame_
  Pending into_;
  std::byte* at_ = nullptr;
  std::size_t left_ = 0;
  bool stalled_ = false;
  bool ended_ = false;
};

class Link {
 public:
  Link(int peer, std::size_t streams);
  int peer() const noexcept { return peer_; }
  void set(std::size_t index, Socket socket);  // 0: control
  bool complete() const noexcept { return missing_ == 0; }
  bool has(std::size_t index) const noexcept { return index < taken_.size() && taken_[index]; }
  std::size_t connections() const noexcept { return taken_.size(); }

  // Grows whenever anything goes to the peer or comes from there.
  std::uint64_t moves() const noexcept { return moves_; }

  // ---- long messages
  Pending send(const void* address, std::size_t bytes, std::uint32_t lane);
  Pending receive(void* address, std::size_t bytes, std::uint32_t lane);
  LaneState& lane(std::uint32_t number) noexcept { return lanes_[number]; }
  bool waiting() const noexcept;  // for a message on the streams
  bool move_streams();
  std::vector<Stream>& streams() noexcept { return streams_; }

  // ---- control
  int control() const noexcept { return control_.get(); }
  // Sends a call; what the kernel does not take at once is copied.
  void call(const Header& header, const void* address, std::size_t bytes);
  void notice(std::span<const std::byte> text, bool orderly);
  bool sending() const noexcept { return out_begin_ < out_.size(); }
  bool send_control();
  bool receive_control();
  // Whether there is something to wait for on the control connection.
  bool listening() const noexcept { return !closed_ && end_ < room_; }
  // The first call that has come and was not freed: its header, its payload after it. Null: none.
  const std::byte* first_call() const noexcept { return calls_.empty() ? nullptr : inbox_.get() + calls_.front().at; }
  std::size_t first_bytes() const noexcept { return calls_.front().bytes; }
  void free_call() noexcept;

  // ---- the end
  // No call will come any more, or nothing on the streams.
  bool calls_over() const noexcept { return broken_ || noticed_ || closed_; }
  bool streams_over() const noexcept;
  bool noticed() const noexcept { return noticed_; }
  const std::vector<std::byte>& notice_text() const noexcept { return notice_; }
  // A process that leaves when it has done its part is no trouble to those that wait for others.
  bool troubled() const noexcept { return broken_ || ((noticed_ || closed_) && !orderly_); }
  const std::string& why() const noexcept { return why_; }
  void fail(const std::string& why);
  // The peer sends something that was not asked for; it is said when nothing else explains it.
  void object(const std::string& what) { objection_ = what; }
  const std::string& objection() const noexcept { return objection_; }
  void shut() noexcept;              // says that nothing more comes
  bool unanswered() const noexcept;  // for kUnansweredMs by the peer's machine

 private:
  struct Call {
    std::size_t at;
    std::size_t bytes;  // header included
  };
  void put(const Frame& frame, const void* first, std::size_t first_bytes, const void* second, std::size_t bytes);
  void parse();

  int peer_;
  Socket control_;
  std::vector<Stream> streams_;
  std::vector<bool> taken_;
  std::size_t missing_;
  std::uint64_t moves_ = 0;
  std::array<LaneState, kLanes> lanes_;
  std::vector<std::byte> out_;  // of the control connection, what the kernel did not take
  std::size_t out_begin_ = 0;
  std::unique_ptr<std::byte[]> inbox_;
  std::size_t room_, end_ = 0, parsed_ = 0;
  std::deque<Call> calls_;
  std::string why_ = "it closed the connection";
  std::string objection_;
  std::vector<std::byte> notice_;
  bool broken_ = false, closed_ = false;  // closed: the control connection, by the peer
  bool noticed_ = false, orderly_ = false;
};

}  // namespace launcher::crossing

#endif
