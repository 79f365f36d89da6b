#include "link.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace launcher::crossing {
namespace {

constexpr std::size_t kVectors = 8;
constexpr std::size_t kSendBytes = 256 * 1024;  // with one call: then it is the other direction's turn
constexpr std::uint32_t kUnansweredMs = 30'000;
// Of the control connection: the peer is at most one call ahead, and says once why it leaves.
constexpr std::size_t kCallRoom = sizeof(Frame) + sizeof(Header) + kCallBytes;
constexpr std::size_t kInboxBytes = 4 * kCallRoom + 4 * (sizeof(Frame) + kNoticeBytes);

bool would_block(int error) noexcept { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

std::string text_of(int error) { return std::generic_category().message(error); }

std::byte* bytes_of(Frame& frame) noexcept { return reinterpret_cast<std::byte*>(&frame); }

}  // namespace

Pending LaneState::find(std::uint64_t sequence) const noexcept {
  if (sequence < first_ || sequence - first_ >= posted_.size()) {
    return nullptr;
  }
  return posted_[sequence - first_];
}

void LaneState::drop_done() noexcept {
  while (!posted_.empty() && posted_.front()->done) {
    posted_.pop_front();
    ++first_;
  }
}

// ---- Stream

void Stream::queue(const Pending& request, std::uint32_t lane, std::uint64_t sequence, std::size_t offset) {
  const Frame frame{lane, 0, sequence, offset, request->bytes};
  out_.push_back({request, frame, piece_at(frame)});
}

bool Stream::send(Link& link) {
  std::array<iovec, kVectors> vectors;
  std::size_t used = 0;
  std::size_t asked = 0;
  std::size_t skip = sent_;
  for (std::size_t index = 0; index < out_.size() && used + 2 <= kVectors && asked < kSendBytes; ++index) {
    Piece& piece = out_[index];
    if (skip < sizeof(Frame)) {
      vectors[used++] = {bytes_of(piece.frame) + skip, sizeof(Frame) - skip};
      asked += sizeof(Frame) - skip;
      skip = 0;
    } else {
      skip -= sizeof(Frame);
    }
    if (piece.bytes > skip) {
      vectors[used++] = {piece.request->address + piece.frame.offset + skip, piece.bytes - skip};
      asked += piece.bytes - skip;
    }
    skip = 0;
  }
  msghdr message{};
  message.msg_iov = vectors.data();
  message.msg_iovlen = used;
  const ssize_t found = ::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (found < 0) {
    if (!would_block(errno)) {
      link.fail(text_of(errno));
    }
    return false;
  }
  sent_ += static_cast<std::size_t>(found);
  while (!out_.empty() && sent_ >= sizeof(Frame) + out_.front().bytes) {
    Piece& piece = out_.front();
    sent_ -= sizeof(Frame) + piece.bytes;
    piece.request->left -= piece.bytes;
    piece.request->done = piece.request->left == 0;
    out_.pop_front();
  }
  return true;
}

bool Stream::match(Link& link) {
  if (frame_.lane < static_cast<std::uint32_t>(Lane::data) || frame_.lane >= kLanes || frame_.offset > frame_.total ||
      frame_.offset % kPieceBytes != 0) {
    link.fail("it sent what is no frame of this protocol");
    return false;
  }
  Pending request = link.lane(frame_.lane).find(frame_.sequence);
  stalled_ = request == nullptr;
  if (stalled_) {
    return false;
  }
  if (frame_.total > request->bytes || (request->started && frame_.offset + piece_at(frame_) > request->bytes)) {
    stalled_ = true;
    link.object("it sent " + std::to_string(frame_.total) + " bytes where at most " + std::to_string(request->bytes) +
                " were expected");
    return false;
  }
  if (!request->started) {
    request->started = true;
    request->left = static_cast<std::size_t>(frame_.total);
  }
  at_ = request->address + frame_.offset;
  left_ = piece_at(frame_);
  if (left_ > request->left) {
    link.fail("it sent a piece of a message twice");
    return false;
  }
  into_ = std::move(request);
  return true;
}

void Stream::finished(Link& link) {
  into_->left -= piece_at(frame_);
  into_->done = into_->left == 0;
  if (into_->done) {
    link.lane(frame_.lane).drop_done();
  }
  into_.reset();
  have_ = 0;
}

bool Stream::receive(Link& link) {
  if (have_ == sizeof(Frame) && into_ == nullptr) {
    if (!match(link)) {
      return false;
    }
    if (left_ == 0) {
      finished(link);
      return true;
    }
  }
  Frame next;  // of the piece after the one that is being read: one call for both
  std::array<iovec, 2> vectors;
  std::size_t used = 0;
  if (into_ != nullptr) {
    vectors[used++] = {at_, left_};
    vectors[used++] = {bytes_of(next), sizeof(Frame)};
  } else {
    vectors[used++] = {bytes_of(frame_) + have_, sizeof(Frame) - have_};
  }
  msghdr message{};
  message.msg_iov = vectors.data();
  message.msg_iovlen = used;
  const ssize_t found = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT);
  if (found <= 0) {
    if (found == 0) {
      ended_ = true;
    } else if (!would_block(errno)) {
      link.fail(text_of(errno));
    }
    return false;
  }
  auto count = static_cast<std::size_t>(found);
  if (into_ == nullptr) {
    have_ += count;
  } else if (count < left_) {
    at_ += count;
    left_ -= count;
  } else {
    count -= left_;
    left_ = 0;
    finished(link);
    std::memcpy(bytes_of(frame_), bytes_of(next), count);
    have_ = count;
  }
  if (have_ == sizeof(Frame) && into_ == nullptr && match(link) && left_ == 0) {
    finished(link);
  }
  return true;
}

// ---- Link

Link::Link(int peer, std::size_t streams)
    : peer_(peer),
      taken_(streams + 1, false),
      missing_(streams + 1),
      inbox_(std::make_unique_for_overwrite<std::byte[]>(kInboxBytes)),
      room_(kInboxBytes) {
  for (std::size_t index = 0; index < streams; ++index) {
    streams_.emplace_back(Socket());
  }
}

void Link::set(std::size_t index, Socket socket) {
  if (index == 0) {
    control_ = std::move(socket);
  } else {
    streams_[index - 1] = Stream(std::move(socket));
  }
  taken_[index] = true;
  --missing_;
}

Pending Link::send(const void* address, std::size_t bytes, std::uint32_t lane) {
  // The kernel reads it only.
  auto request = std::make_shared<Request>(
      Request{peer_, const_cast<std::byte*>(static_cast<const std::byte*>(address)), bytes, bytes, true, false});
  const std::uint64_t sequence = lanes_[lane].next_send();
  std::size_t offset = 0;
  do {
    const std::size_t index = (sequence + offset / kPieceBytes) % streams_.size();
    streams_[index].queue(request, lane, sequence, offset);
    offset += kPieceBytes;
  } while (offset < bytes);
  return request;
}

Pending Link::receive(void* address, std::size_t bytes, std::uint32_t lane) {
  auto request =
      std::make_shared<Request>(Request{peer_, static_cast<std::byte*>(address), bytes, bytes, false, false});
  lanes_[lane].post(request);
  return request;
}

bool Link::waiting() const noexcept {
  for (auto lane = static_cast<std::uint32_t>(Lane::data); lane < kLanes; ++lane) {
    if (lanes_[lane].waiting()) {
      return true;
    }
  }
  return false;
}

bool Link::move_streams() {
  bool moved = false;
  const bool reading = waiting();
  for (Stream& stream : streams_) {
    if (stream.sending() && !broken_) {
      moved = stream.send(*this) || moved;
    }
    if (reading && !broken_ && !stream.ended()) {
      moved = stream.receive(*this) || moved;
    }
  }
  moves_ += moved ? 1 : 0;
  return moved;
}

void Link::put(const Frame& frame, const void* first, std::size_t first_bytes, const void* second, std::size_t bytes) {
  if (broken_ || closed_) {
    return;  // the wait that follows says so
  }
  std::size_t taken = 0;
  const std::size_t total = sizeof frame + first_bytes + bytes;
  iovec vectors[] = {{const_cast<Frame*>(&frame), sizeof frame},
                     {const_cast<void*>(first), first_bytes},
                     {const_cast<void*>(second), bytes}};
  if (!sending()) {
    msghdr message{};
    message.msg_iov = vectors;
    message.msg_iovlen = 3;
    const ssize_t found = ::sendmsg(control_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (found < 0 && !would_block(errno)) {
      fail(text_of(errno));
      return;
    }
    taken = found > 0 ? static_cast<std::size_t>(found) : 0;
  }
  if (taken == total) {
    return;
  }
  if (!sending()) {
    out_.clear();
    out_begin_ = 0;
  }
  for (const iovec& part : vectors) {
    const std::size_t skip = std::min(taken, part.iov_len);
    taken -= skip;
    const auto* from = static_cast<const std::byte*>(part.iov_base);
    out_.insert(out_.end(), from + skip, from + part.iov_len);
  }
}

void Link::call(const Header& header, const void* address, std::size_t bytes) {
  const Frame frame{static_cast<std::uint32_t>(Lane::calls), 0, 0, 0, sizeof header + bytes};
  put(frame, &header, sizeof header, bytes == 0 ? &header : address, bytes);
}

void Link::notice(std::span<const std::byte> text, bool orderly) {
  const Frame frame{static_cast<std::uint32_t>(Lane::notices), orderly ? kOrderly : 0, 0, 0, text.size()};
  put(frame, text.data(), text.size(), text.data(), 0);
}

bool Link::send_control() {
  const ssize_t found =
      ::send(control_.get(), out_.data() + out_begin_, out_.size() - out_begin_, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (found < 0) {
    if (!would_block(errno)) {
      fail(text_of(errno));
      out_begin_ = out_.size();
    }
    return false;
  }
  out_begin_ += static_cast<std::size_t>(found);
  ++moves_;
  return found > 0;
}

bool Link::receive_control() {
  if (closed_ || end_ == room_) {
    return false;
  }
  const ssize_t found = ::recv(control_.get(), inbox_.get() + end_, room_ - end_, MSG_DONTWAIT);
  if (found <= 0) {
    if (found == 0) {
      closed_ = true;
    } else if (!would_block(errno)) {
      fail(text_of(errno));
    }
    return false;
  }
  end_ += static_cast<std::size_t>(found);
  ++moves_;
  parse();
  return true;
}

void Link::parse() {
  while (end_ - parsed_ >= sizeof(Frame)) {
    Frame frame;
    std::memcpy(&frame, inbox_.get() + parsed_, sizeof frame);
    const bool call = frame.lane == static_cast<std::uint32_t>(Lane::calls) && frame.total >= sizeof(Header) &&
                      frame.total <= sizeof(Header) + kCallBytes;
    const bool notice = frame.lane == static_cast<std::uint32_t>(Lane::notices) && frame.total <= kNoticeBytes;
    if (!call && !notice) {
      fail("it sent what is no frame of this protocol");
      return;
    }
    const auto bytes = static_cast<std::size_t>(frame.total);
    if (end_ - parsed_ < sizeof frame + bytes) {
      return;
    }
    const std::size_t at = parsed_ + sizeof frame;
    parsed_ = at + bytes;
    if (call) {
      calls_.push_back({at, bytes});
      continue;
    }
    if (!noticed_) {
      notice_.assign(inbox_.get() + at, inbox_.get() + parsed_);
    }
    noticed_ = true;
    orderly_ = (frame.flags & kOrderly) != 0;
  }
  if (calls_.empty() && parsed_ == end_) {
    parsed_ = end_ = 0;
  }
}

void Link::free_call() noexcept {
  calls_.pop_front();
  const std::size_t begin = calls_.empty() ? parsed_ : calls_.front().at - sizeof(Frame);
  if (begin == end_) {
    parsed_ = end_ = 0;
  } else if (end_ > room_ / 2) {
    std::memmove(inbox_.get(), inbox_.get() + begin, end_ - begin);
    for (Call& call : calls_) {
      call.at -= begin;
    }
    parsed_ -= begin;
    end_ -= begin;
  }
}

bool Link::streams_over() const noexcept {
  return troubled() || std::all_of(streams_.begin(), streams_.end(), [](const Stream& one) { return one.ended(); });
}

void Link::fail(const std::string& why) {
  if (!broken_) {
    broken_ = true;
    why_ = why;
  }
}

void Link::shut() noexcept {
  static_cast<void>(::shutdown(control_.get(), SHUT_WR));
  streams_.clear();  // closed: nothing is read or written there any more
  for (LaneState& lane : lanes_) {
    lane.clear();
  }
}

bool Link::unanswered() const noexcept {
  tcp_info info{};
  socklen_t length = sizeof info;
  const auto silent = [&](int descriptor) {
    length = sizeof info;
    return ::getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_retransmits > 0 &&
           info.tcpi_last_ack_recv > kUnansweredMs;
  };
  bool found = silent(control_.get());
  for (const Stream& stream : streams_) {
    found = found || silent(stream.descriptor());
  }
  return found;
}

}  // namespace launcher::crossing
