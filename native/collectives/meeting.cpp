#include "meeting.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "join.h"

namespace launcher::collectives {
namespace {

Descriptor new_socket() {
  Descriptor out(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!out) {
    throw_system("socket");
  }
  return out;
}

void send_answer(int socket, const Answer& answer, const std::vector<int>& descriptors, Clock::time_point deadline) {
  iovec body{const_cast<Answer*>(&answer), sizeof answer};
  msghdr message{};
  message.msg_iov = &body;
  message.msg_iovlen = 1;
  std::vector<char> control(CMSG_SPACE(descriptors.size() * sizeof(int)));
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
  }
  // A user may have only so many descriptors on their way (RLIMIT_NOFILE): the ranks that have theirs take them in
  // meanwhile. Who is gone by now is found out by the first wait for it.
  while (::sendmsg(socket, &message, MSG_NOSIGNAL) < 0 &&
         (errno == ETOOMANYREFS || errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == EINTR) &&
         Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

// The first rank: waits for the others.
class Host : Join {
 public:
  explicit Host(const Options& options)
      : Join(options),
        peers_(static_cast<std::size_t>(options.size)),
        pids_(peers_.size(), 0),
        gone_(peers_.size(), 0),
        ready_(peers_.size(), 0),
        asked_(peers_.size()) {}
  ~Host() { forget(); }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  Meeting run(std::size_t slot_bytes) {
    try {
      for (int rank = 1; rank < options_.size; ++rank) {
        withdraw_letter(rank);
      }
      look_for_letters();
      listen();
      while (absent() > 0) {
        wait_for_one();
      }
      forget();
      start_clock();
      Meeting out = hand_out(slot_bytes);
      while (absent() > 0) {
        wait_for_one();
      }
      for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
        send_answer(peers_[rank].get(), Answer{}, {}, deadline_);
      }
      turn_away(
          make_end(Failure::mismatch, -1, "the group is complete without this process: another came as its rank"));
      return out;
    } catch (const GroupError&) {
      tell(end_);
      throw;
    } catch (const std::exception& error) {
      tell(make_end(Failure::system, 0, explain(error)));
      rethrow(error);
    }
  }

 private:
  void look_for_letters() {
    std::optional<End> first;
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      const std::optional<End> found = peers_[rank] ? std::nullopt : take_letter(static_cast<int>(rank));
      if (found) {
        gone_[rank] = 1;
        first = first ? first : found;
      }
    }
    if (first) {
      give_up(failure_of(*first), culprit_of(*first), too_late(*first));
    }
  }

  void listen() {
    socket_ = new_socket();
    ::unlink(file().c_str());  // of a job that was killed; the names of two attempts differ
    const sockaddr_un own = address();
    if (::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&own), sizeof own) != 0 ||
        ::listen(socket_.get(), options_.size) != 0) {
      throw_system("socket of group " + options_.name + " in " + options_.directory);
    }
    named_ = true;
  }

  void tell(const End& end) noexcept {
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      if (!peers_[rank] && gone_[rank] == 0) {
        send_letter(static_cast<int>(rank), end);
      }
    }
    forget();
    Answer no;
    no.end = end;
    for (const Descriptor& peer : peers_) {
      if (peer) {
        static_cast<void>(::send(peer.get(), &no, sizeof no, MSG_NOSIGNAL));
      }
    }
    turn_away(end);
  }

  // Who has called but was not greeted yet hears the reason too: it would take this rank for dead otherwise.
  void turn_away(const End& end) noexcept {
    Answer no;
    no.end = end;
    while (socket_) {
      const Descriptor stranger(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!stranger) {
        break;
      }
      static_cast<void>(::send(stranger.get(), &no, sizeof no, MSG_NOSIGNAL));
    }
    for (const Descriptor& stranger : strangers_) {
      static_cast<void>(::send(stranger.get(), &no, sizeof no, MSG_NOSIGNAL));
    }
  }

  void forget() noexcept {
    if (named_) {
      ::unlink(file().c_str());
      named_ = false;
    }
  }

  bool is_absent(std::size_t rank) const { return !peers_[rank] || (handed_out_ && ready_[rank] == 0); }
  std::size_t absent() const {
    std::size_t count = 0;
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      count += is_absent(rank) ? 1U : 0U;
    }
    return count;
  }

  [[noreturn]] void give_up(Failure failure, int rank, const std::string& what) {
    end_ = make_end(failure, rank, what);
    fail(failure, rank, what);
  }

  [[noreturn]] void give_up_on_absent(const std::string& limit) {
    constexpr std::size_t kNamed = 8;
    std::string names;
    int first = -1;
    std::size_t count = 0;
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      if (is_absent(rank)) {
        first = first < 0 ? static_cast<int>(rank) : first;
        if (++count <= kNamed) {
          names += (names.empty() ? "" : ", ") + place(static_cast<int>(rank));
        }
      }
    }
    if (count > kNamed) {
      names += " and " + std::to_string(count - kNamed) + " more";
    }
    names += (handed_out_ ? " came, but did not answer within " : " did not come within ") + limit;
    if (handed_out_ && Process(pids_[static_cast<std::size_t>(first)]).stopped()) {
      names += "; its process is stopped (SIGSTOP)";
    }
    give_up(Failure::timeout, first, names);
  }

  void wait_for_one() {
    std::vector<pollfd> polled;
    std::vector<int> ranks;
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      if (peers_[rank]) {
        polled.push_back({peers_[rank].get(), POLLIN, 0});
        ranks.push_back(static_cast<int>(rank));
      }
    }
    for (std::size_t index = 0; !handed_out_ && index < strangers_.size(); ++index) {
      polled.push_back({strangers_[index].get(), POLLIN, 0});
    }
    if (!handed_out_) {
      polled.push_back({socket_.get(), POLLIN, 0});
    }
    const int events = ::poll(polled.data(), polled.size(), time_up_.empty() ? tick_ms() : 0);
    if (events < 0 && errno != EINTR) {
      throw_system("poll");
    }
    for (std::size_t index = 0; index < ranks.size(); ++index) {
      if (polled[index].revents != 0) {
        hear(ranks[index]);
      }
    }
    for (std::size_t index = strangers_.size(); !handed_out_ && index-- > 0;) {
      if (polled[ranks.size() + index].revents != 0) {
        Descriptor stranger = std::move(strangers_[index]);
        strangers_.erase(strangers_.begin() + static_cast<std::ptrdiff_t>(index));
        greet(std::move(stranger));
      }
    }
    if (!handed_out_ && polled.back().revents != 0) {
      Descriptor stranger(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (stranger) {
        strangers_.push_back(std::move(stranger));
      } else if (errno == EMFILE || errno == ENFILE) {
        throw_system("accept");
      }
    }
    if (interrupted()) {
      give_up(Failure::interrupted, 0, own_place() + " was interrupted while it waited");
    }
    if (events == 0 && !handed_out_) {
      look_for_letters();  // of one that gave up just before this one came
    }
    // Only when nobody is at the door: this process may have been stopped for a while.
    if (events == 0 && (expired() || !time_up_.empty())) {
      give_up_on_absent(time_up_.empty() ? limit() : time_up_);
    }
  }

  void hear(int rank) {
    Word word;
    const ssize_t count = ::recv(peers_[static_cast<std::size_t>(rank)].get(), &word, sizeof word, 0);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
      return;
    }
    std::string& asked = asked_[static_cast<std::size_t>(rank)];
    if (count != static_cast<ssize_t>(sizeof word)) {
      if (!asked.empty()) {
        give_up(Failure::timeout, 0, own_place() + " gave " + place(rank) + " no answer within " + asked);
      }
      give_up(Failure::lost, rank, place(rank) + " has died while the group was being made");
    }
    if (word.saying == Saying::ready) {
      ready_[static_cast<std::size_t>(rank)] = 1;
    } else if (static_cast<Failure>(word.failure) != Failure::timeout) {
      give_up(std::min(static_cast<Failure>(word.failure), Failure::system), rank, to_string(word.reason));
    } else {
      asked = asked.empty() ? to_string(word.reason) : asked;
      if (!handed_out_ || ready_[static_cast<std::size_t>(rank)] != 0) {  // else it has not seen the answer yet
        time_up_ = asked;
      }
    }
  }

  void greet(Descriptor peer) {
    Word hello;
    ucred who{};
    socklen_t length = sizeof who;
    if (::recv(peer.get(), &hello, sizeof hello, 0) != static_cast<ssize_t>(sizeof hello) ||
        ::getsockopt(peer.get(), SOL_SOCKET, SO_PEERCRED, &who, &length) != 0 || who.uid != ::geteuid() ||
        hello.magic != kSegmentMagic) {
      return;  // not one of ours
    }
    const bool known = hello.rank > 0 && hello.rank < options_.size;
    if (!known || hello.size != options_.size) {
      give_up(Failure::mismatch, known ? hello.rank : -1,
              "a process says that it is rank " + std::to_string(hello.rank) + " of " + std::to_string(hello.size) +
                  ", here the group has " + std::to_string(options_.size));
    }
    const auto rank = static_cast<std::size_t>(hello.rank);
    if (peers_[rank]) {
      give_up(Failure::mismatch, hello.rank, place(hello.rank) + " came twice");
    }
    if (who.pid <= 0) {
      give_up(Failure::system, hello.rank,
              place(hello.rank) + " is in another process namespace: its end could not be seen");
    }
    peers_[rank] = std::move(peer);
    pids_[rank] = who.pid;
  }

  Meeting hand_out(std::size_t slot_bytes) {
    handed_out_ = true;
    time_up_.clear();
    Meeting out;
    Answer yes;
    yes.segment_bytes = Segment::bytes_for(options_.size, slot_bytes);
    const Descriptor memory = Segment::create(options_.size, slot_bytes);
    out.segment = std::make_unique<Segment>(memory, yes.segment_bytes);
    pids_[0] = ::getpid();
    std::vector<Descriptor> inboxes;
    std::vector<int> sent{memory.get(), -1};
    for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
      std::array<int, 2> pair{};
      if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair.data()) != 0) {
        throw_system("socketpair");
      }
      inboxes.emplace_back(pair[0]);
      out.outboxes.emplace_back(pair[1]);
      sent.push_back(pair[1]);
      yes.pids[rank] = pids_[rank];
    }
    for (std::size_t rank = 1; rank < peers_.size(); ++rank) {
      sent[1] = inboxes[rank].get();
      send_answer(peers_[rank].get(), yes, sent, deadline_);
      inboxes[rank] = Descriptor();
      out.processes.resize(rank);
      out.processes.emplace_back(pids_[rank]);
    }
    out.processes.resize(peers_.size());
    out.inbox = std::move(inboxes[0]);
    return out;
  }

  Descriptor socket_;
  bool named_ = false;
  bool handed_out_ = false;
  std::vector<Descriptor> peers_;  // by rank
  std::vector<pid_t> pids_;
  std::vector<char> gone_;          // by rank: has given up before this one came
  std::vector<char> ready_;         // by rank: has taken what it was given
  std::vector<std::string> asked_;  // by rank: its limit, once that is over
  std::string time_up_;             // the limit of a rank that waits for an answer now
  std::vector<Descriptor> strangers_;
  End end_;
};

class Guest : Join {
 public:
  explicit Guest(const Options& options) : Join(options) {}

  Meeting run() {
    withdraw_letter(0);
    try {
      connect();
    } catch (const std::system_error& error) {
      send_letter(0, make_end(Failure::system, options_.rank, explain(error)));
      rethrow(error);
    }
    say(Saying::here);
    std::vector<Descriptor> received;
    const Answer all = listen(received);
    start_clock();
    Meeting out;
    try {
      take(out, all, received);
    } catch (const std::exception& error) {
      say(Saying::gives_up, Failure::system, explain(error));
      rethrow(error);
    }
    segment_ = out.segment.get();
    say(Saying::ready);
    listen(received);
    return out;
  }

 private:
  // A first rank that has given up may have left an answer, and closed its end.
  void say(Saying saying, Failure failure = Failure::lost, const std::string& reason = "") const noexcept {
    const Word word{kSegmentMagic,  saying, options_.rank, options_.size, static_cast<std::uint32_t>(failure),
                    to_text(reason)};
    static_cast<void>(::send(socket_.get(), &word, sizeof word, MSG_NOSIGNAL));
  }

  // Says why it does not wait any longer, wherever the first rank may hear it.
  [[noreturn]] void give_up(Failure failure, int culprit, const std::string& what) const {
    const End end = make_end(failure, culprit, what);
    if (!connected_) {
      send_letter(0, end);
    } else {
      say(Saying::gives_up, failure_of(end), what);
      if (segment_ != nullptr) {  // the others may be in the group by now
        segment_->end(failure_of(end), culprit, what);
      }
    }
    fail(failure, culprit, what);
  }

  [[noreturn]] void told(const End& end, bool late) const {
    fail(failure_of(end), culprit_of(end), late ? too_late(end) : to_string(end.reason));
  }

  void check_interrupt() const {
    if (interrupted()) {
      give_up(Failure::interrupted, options_.rank, own_place() + " was interrupted while it waited");
    }
  }

  void connect() {
    auto pause = std::chrono::microseconds(100);
    const sockaddr_un there = address();
    for (;;) {
      socket_ = new_socket();
      if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&there), sizeof there) == 0) {
        connected_ = true;
        return;
      }
      if (errno != ENOENT && errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR) {
        throw_system("connect to group " + options_.name + " in " + options_.directory);
      }
      if (const std::optional<End> end = take_letter(0)) {
        told(*end, true);
      }
      check_interrupt();
      if (expired()) {
        give_up(Failure::timeout, 0, place(0) + " did not come within " + limit());
      }
      std::this_thread::sleep_for(pause);  // there is nothing to wait on before the file is there
      pause = std::min(pause * 2, std::chrono::microseconds(10000));
    }
  }

  // The first rank's next answer; throws when it is that there is nothing to wait for.
  Answer listen(std::vector<Descriptor>& received) {
    pollfd answer{socket_.get(), POLLIN, 0};
    // The first rank knows who is missing, and says so to a rank whose time is over.
    std::optional<Clock::time_point> patience;
    while (::poll(&answer, 1, tick_ms()) <= 0) {
      check_interrupt();
      if (!patience && expired()) {
        say(Saying::gives_up, Failure::timeout, limit());
        patience = Clock::now() + std::chrono::seconds(1);
      } else if (patience && Clock::now() >= *patience) {
        give_up(Failure::timeout, 0, place(0) + " gave no answer within " + limit());
      }
    }
    Answer out;
    iovec body{&out, sizeof out};
    std::array<char, CMSG_SPACE((kMaxRanks + 2) * sizeof(int))> control;
    msghdr message{};
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    ssize_t count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (count < 0 &&
        errno == ECONNRESET) {  // it closed with a word of ours unread; what it said comes after this error
      count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    }
    for (cmsghdr* header = count > 0 ? CMSG_FIRSTHDR(&message) : nullptr; header != nullptr;
         header = CMSG_NXTHDR(&message, header)) {
      if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
        const std::size_t many = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t index = 0; index < many; ++index) {
          int fd;
          std::memcpy(&fd, CMSG_DATA(header) + index * sizeof(int), sizeof fd);
          received.emplace_back(fd);
        }
      }
    }
    const std::optional<End> end = take_letter(0);  // written just before or after this rank called
    if (count <= 0) {
      if (end) {
        told(*end, true);
      }
      give_up(Failure::lost, 0, place(0) + " has died while the group was being made");
    }
    if (count != static_cast<ssize_t>(sizeof out)) {
      throw std::invalid_argument("group " + options_.name + ": rank 0 is of another build of this package");
    }
    if (out.end.failure != 0) {
      told(out.end, false);
    }
    return out;
  }

  void take(Meeting& out, const Answer& all, std::vector<Descriptor>& received) const {
    const auto ranks = static_cast<std::size_t>(options_.size);
    if (received.size() != ranks + 2) {
      throw std::system_error(EMFILE, std::generic_category(), "descriptors of the group");
    }
    out.segment = std::make_unique<Segment>(received[0], all.segment_bytes);
    out.inbox = std::move(received[1]);
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      out.outboxes.push_back(std::move(received[rank + 2]));
      out.processes.push_back(static_cast<int>(rank) == options_.rank ? Process() : Process(all.pids[rank]));
    }
    received.clear();
  }

  Descriptor socket_;
  bool connected_ = false;
  Segment* segment_ = nullptr;  // once it is mapped
};

}  // namespace

int job_rank(const Options& options, int rank) noexcept {
  return options.ranks.empty() ? rank : options.ranks[static_cast<std::size_t>(rank)];
}

std::string place_of(const Options& options, int rank) {
  return "rank " + std::to_string(job_rank(options, rank)) + (options.host.empty() ? "" : " on " + options.host);
}

Meeting meet(const Options& options, std::size_t slot_bytes) {
  if (options.rank == 0) {
    return Host(options).run(slot_bytes);
  }
  return Guest(options).run();
}

}  // namespace launcher::collectives
