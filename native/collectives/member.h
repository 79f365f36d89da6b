// One rank's end of a segment: telling the others, waiting for them, and finding out that there is nothing to wait for.
#ifndef LAUNCHER_COLLECTIVES_MEMBER_H
#define LAUNCHER_COLLECTIVES_MEMBER_H

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "launcher/collectives.h"
#include "meeting.h"
#include "segment.h"

namespace launcher::collectives {

class Member {
 public:
  Member(Options options, std::shared_ptr<Segment> segment, std::vector<Process> processes);
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  int rank() const noexcept { return options_.rank; }
  int size() const noexcept { return options_.size; }
  Segment& segment() const noexcept { return *segment_; }
  const Options& options() const noexcept { return options_; }
  const Process& process(int rank) const noexcept { return processes_[static_cast<std::size_t>(rank)]; }
  std::uint64_t sequence() const noexcept { return sequence_; }
  std::uint64_t waited_ns() const noexcept { return waited_ns_; }
  int spin() const noexcept { return spin_; }
  // More ranks than cores: the same on every rank.
  bool crowded() const noexcept { return crowded_; }
  void set_timeout(std::chrono::nanoseconds timeout) noexcept { options_.timeout = timeout; }

  // A call from its begin to its end, for the status page and for the eyes of the others.
  class Turn {
   public:
    Turn(Member& member, Operation operation, std::uint64_t bytes)
        : member_(member), exceptions_(std::uncaught_exceptions()) {
      member.begin(operation, bytes);
    }
    ~Turn() { member_.end(std::uncaught_exceptions() > exceptions_); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Member& member_;
    int exceptions_;
  };

  // Says what this rank calls, waits until all have said theirs, and checks that it is the same.
  void enter(const Call& call);
  // What another rank said of the current call.
  const Call& call_of(int rank) const noexcept { return entry(rank).call; }

  // Steps of a call, counted through the life of the group. wait(n): until all others have published n.
  void publish(std::uint32_t step) { publish(own().stage, step); }
  void wait(std::uint32_t step) {
    for (int rank = 0; rank < size(); ++rank) {
      if (rank != options_.rank) {
        wait_for(segment_->place(rank).stage, step, rank);
      }
    }
  }
  // Until all have come here.
  void meet_again() {
    publish(++steps_);
    wait(steps_);
  }
  std::uint32_t steps() const noexcept { return steps_; }
  void skip_steps(std::uint32_t count) noexcept { steps_ += count; }

  void phase(CollectivePhase phase) noexcept {
    if (shows_) {
      options_.page->set_collective_phase(phase);
    }
  }

  // Ends the group: the first reason is the one that all are told.
  [[noreturn]] void fail(Failure failure, int culprit, const std::string& what);
  [[noreturn]] void lost(int rank);  // fails: its process has ended
  void end_group(Failure failure, int culprit, const std::string& what) noexcept;
  // The same by this rank's own doing, also where memory has run out.
  void end_group_as(Failure failure, const char* what, const std::string& reason) noexcept;
  void check_usable();
  // Looks for a reason not to wait any longer for `rank`; throws it. `thorough`: also at processes and the clock.
  void check(int rank, bool thorough);
  void leave() noexcept;
  bool forked() const noexcept { return generation_ != fork_generation(); }

 private:
  Place& own() const noexcept { return segment_->place(options_.rank); }
  Entry& entry(int rank) const noexcept { return segment_->place(rank).entries[sequence_ & 1U]; }
  void begin(Operation operation, std::uint64_t bytes);
  void end(bool threw) noexcept;
  void publish(Flag& flag, std::uint32_t value) noexcept;
  void wait_for(Flag& flag, std::uint32_t value, int rank) {
    if (!reached(flag, value)) {
      wait_long(flag, value, rank);
    }
  }
  static bool reached(const Flag& flag, std::uint32_t value) noexcept {
    return static_cast<std::int32_t>(flag.value.load(std::memory_order_acquire) - value) >= 0;
  }
  void wait_long(Flag& flag, std::uint32_t value, int rank);
  void sleep(Flag& flag, std::uint32_t value, int rank);
  void compare(int rank);
  void wake_everyone() noexcept;
  void choose_waiting();
  [[noreturn]] void throw_ended();
  std::string title() const;
  std::string whereabouts(int rank) const;

  Options options_;
  std::shared_ptr<Segment> segment_;
  std::vector<Process> processes_;
  std::uint64_t generation_ = fork_generation();
  std::uint64_t sequence_ = 0;
  std::uint32_t steps_ = 0;
  std::uint64_t waited_ns_ = 0;
  std::uint64_t deadline_ns_ = 0;  // of the current call; 0: it has not had to sleep yet
  int spin_ = 0;
  int yields_ = 0;
  bool crowded_ = false;
  bool fences_ = false;  // sleepers run the fence of those who publish
  Operation operation_ = Operation::barrier;
  std::uint64_t bytes_ = 0;
  bool shows_ = false;  // on the page: one group of the process at a time
};

}  // namespace launcher::collectives

#endif
