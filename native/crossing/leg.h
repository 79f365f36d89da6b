// The way between hosts over TCP: one rank's connections to ranks of other hosts, and what goes over them.
//
// Nobody blocks in sending while the other side does: a wait moves both directions of all connections. It polls for a
// short time, then sleeps, and looks about every 50 ms at the deadline, at the caller's interruption and at the peers.
// A peer whose process ends closes its connections, which ends every wait at once; one whose machine is gone is noticed
// by what it no longer acknowledges. A peer that leaves in good order disturbs only those who wait for something from
// it.
//
// One thread at a time calls a leg, except give_up().
#ifndef LAUNCHER_CROSSING_LEG_H
#define LAUNCHER_CROSSING_LEG_H

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "join.h"
#include "kernels.h"
#include "launcher/elements.h"
#include "link.h"
#include "system.h"

namespace launcher::crossing {

struct Options {
  std::string group;  // another one for each group, the same on its members
  int rank = 0;
  int size = 1;
  std::string host;  // numeric address to listen at
  std::chrono::nanoseconds timeout = std::chrono::minutes(30);
  // Called about every 50 ms of waiting, on the calling thread; true: stop waiting (Kind::interrupted).
  std::function<bool()> interrupted;
  std::chrono::nanoseconds poll = std::chrono::microseconds(100);  // before it sleeps
};

// How an allreduce between hosts is folded; the same for many calls.
struct Plan {
  Header header;  // but for the number of the call and the count
  collectives::ReduceFunction fold = nullptr;
  std::size_t item = 0;  // bytes of an element
  double prescale = 1.0;
  collectives::Finish early;  // of this host's part, before it is sent
  collectives::Finish finish;
  bool scaled() const noexcept { return prescale != 1.0 || early.scale != 1.0; }
};

class Leg {
 public:
  explicit Leg(Options options);
  Leg(const Leg&) = delete;
  Leg& operator=(const Leg&) = delete;

  const Endpoint& own() const noexcept { return gate_.own(); }
  // Connects to those of `peers` that it is not connected to, over `streams` streams each. All of them call it.
  void connect(std::span<const Endpoint> peers, std::size_t streams);
  bool connected(int peer) const noexcept;
  // Whom this rank reduces with: the ranks by host, itself at `host`. Messages of up to `short_bytes` (kCallBytes at
  // most) go beside the call.
  void set_column(std::vector<int> ranks, std::size_t host, std::size_t short_bytes);
  void set_timeout(std::chrono::nanoseconds timeout);

  // ---- messages; addresses must stay valid until they were waited for
  Pending send(int peer, const void* address, std::size_t bytes, std::uint32_t lane);
  Pending receive(int peer, void* address, std::size_t bytes, std::uint32_t lane);
  void wait(std::span<const Pending> requests);
  void progress();

  // ---- calls: short messages of at most kCallBytes beside their header, which is compared by who takes them
  void call(const Header& header, const void* address, std::size_t bytes, std::span<const int> peers);
  // Waits for the next call of `peer`; its payload, valid until it is freed. Throws CallMismatch.
  const std::byte* take(const Header& header, int peer, std::size_t bytes);
  void free(int peer);
  void flush();  // returns when all calls have left

  // target[i] = finish(fold over hosts, in their order, of what the column's ranks have at source[i]).
  void allreduce(const Plan& plan, std::uint64_t sequence, const void* source, void* target, std::size_t count);

  // ---- the end
  // What `peer` has said about why it gave up, as far as it comes within `limit`. Empty: nothing.
  std::vector<std::byte> notice_of(int peer, std::chrono::nanoseconds limit);
  // Tells all peers, those too that are not connected fully, and closes the connections; a call of another thread
  // fails. `orderly`: nothing went wrong.
  void give_up(std::span<const std::byte> notice, bool orderly) noexcept;
  // In a fork's child the connections are its parent's and closed: calls throw, and destroying the leg is not safe.
  bool forked() const noexcept { return generation_ != collectives::fork_generation(); }

  std::uint64_t sent_bytes() const noexcept { return sent_bytes_; }
  std::uint64_t messages() const noexcept { return messages_; }
  std::uint64_t short_calls() const noexcept { return short_calls_; }
  std::uint64_t long_calls() const noexcept { return long_calls_; }

 private:
  using Clock = std::chrono::steady_clock;
  // One wait: when it began, and whom it is for.
  struct Patience {
    Clock::time_point began = Clock::now();  // or when something was last seen to move to or from the peer
    Clock::time_point polling = began;
    Clock::time_point next_question = began + std::chrono::seconds(1);
    std::uint64_t moves = 0;  // of the peer's link, when it was looked at
    unsigned polls = 0;
    bool idle = true;
  };
  class Turn;

  Link& link(int peer);
  template <typename Done, typename Culprit>
  void await(bool streams, Done done, Culprit culprit);
  bool move_streams();
  bool move_controls();
  // Nothing moved: polls on, or sleeps. Throws what ends the wait for `peer`.
  void pause(Patience& patience, bool streams, int peer);
  void look(Patience& patience, Clock::time_point now, bool streams, int peer);
  // Something moved: looks all the same, about as often, but leaves what ends without a word to look().
  void glance(Patience& patience, int peer);
  void look_round(Patience& patience, Clock::time_point now, int peer);
  [[noreturn]] void ended(const Link& link) const;
  void sleep(bool streams);
  void check_stopped() const;
  void list_active();
  void say_farewell(std::span<const std::byte> notice, bool orderly);

  void send_call(const Header& header, const void* address, std::size_t bytes, int peer);
  const std::byte* take_call(const Header& header, int peer, std::size_t bytes);
  void flush_calls();
  void allreduce_short(const Plan& plan, const Header& header, const void* source, void* target, std::size_t count);
  void allreduce_direct(const Plan& plan, const Header& header, const std::byte* source, std::byte* target,
                        std::size_t count);
  void allreduce_owners(const Plan& plan, const Header& header, const std::byte* source, std::byte* target,
                        std::size_t count);
  void announce(const Header& header);
  void check_calls(const Header& header);
  void finish(const Pending& request);
  std::byte* scratch(std::size_t bytes);
  const void* scaled(const Plan& plan, const void* source, std::size_t count);
  Pending send_part(int peer, const std::byte* address, std::size_t bytes, Lane lane);

  Options options_;
  Gate gate_;
  Links links_;
  std::vector<Link*> active_;  // the same, as they are gone through
  std::vector<int> column_;
  std::size_t host_ = 0;
  std::size_t short_bytes_ = 0;
  std::vector<Link*> by_host_;
  std::unique_ptr<std::byte[]> scratch_;
  std::size_t scratch_bytes_ = 0;
  std::unique_ptr<std::byte[]> scaled_;
  std::size_t scaled_bytes_ = 0;
  std::vector<const void*> sources_;
  std::uint64_t sent_bytes_ = 0, messages_ = 0, short_calls_ = 0, long_calls_ = 0;
  Socket bell_;  // rung by give_up()
  const std::uint64_t generation_ = collectives::fork_generation();
  Clock::time_point next_look_{};  // lasts longer than a wait: long messages are many short ones
  std::mutex turn_;
  std::atomic<bool> stopped_{false};
  bool closed_ = false;
};

}  // namespace launcher::crossing

#endif
