// The guardian: parent and subreaper of all ranks of one host.
//
// The supervisor (Python) decides; the guardian does: it starts ranks, reads their output, sees them end, kills what is
// left. Being a process of its own buys three things that a Python supervisor cannot have. It is the parent of every
// rank and adopts every orphan, so "nothing is left" is one system call (ECHILD), and it holds even for a grandchild
// that called setsid and was orphaned. It outlives a supervisor killed with SIGKILL for as long as it takes to kill
// the whole tree. And it is single-minded: a flood of log lines or a busy interpreter cannot delay it.
// If the guardian itself is killed, every rank dies with it (PR_SET_PDEATHSIG) and orphans fall to the supervisor.
//
// Commands (from the supervisor), one frame each; lists are a count followed by the items:
//   hello   cap_bytes raw                         first; raw = 1: one rank only, output passed through unchanged
//   spawn   kind slot directory out_path err_path console prefix cpus[] argv[] environment[] connection
//           kind: exec | zygote (a child that forks ranks) | fork (a rank forked by the zygote)
//           slot: a local rank; -1 is the zygote's; below -2 are helpers, which are no ranks (mpirun, MPI daemons)
//           console: bit 0 shows stdout, bit 1 stderr
//           connection: the agent that it stands for, whose descriptors it gets (exec only); 0: none
//   signal  slot number                           to the leader only; slot -2: all living ranks, no helper
//   listen  path                                  serves agents there from now on, see agents.h
//   reply   connection code text                  lets an agent say `text` ("": nothing) and end with `code`
//   sweep   term_ms                               end whatever is left: SIGTERM, after term_ms SIGKILL until empty
//   stats   -                                     asks for the counters
//   say     stream text                           a line of the launcher's own for fd 1 or 2
//   quit    -                                     sweep without mercy, flush the console, end
// Events (to the supervisor):
//   started slot pid monotonic_ns
//   spawn_failed slot errno step
//   exited  slot pid how value monotonic_ns maxrss_kib utime_us stime_us stopped out_tail err_tail
//           how: exit | signal; value: the code or the signal number
//   listening errno step                          0: agents are served
//   request connection pid parent parent_command kind directory argv[] environment[]
//           an agent (process `pid`, started by `parent`) wants something started; kind: rsh | rank. It is told by
//           itself when what stands for it has ended with 0, and only then: of a failure mpirun shall not know first
//   hangup  connection cause                      an agent went away before it was told to; what stands for it lives
//   on;
//           cause: gone (killed) | orphaned (its parent has ended) | garbage
//   agent_signal connection number                the agent was sent a signal
//   empty   killed[]                              nothing is left; "pid command" of each process that had to be killed
//   stuck   survivors[]                           "pid state wait_channel command" of what SIGKILL did not end in time
//   stats   bytes_of_slots[]  dropped_lines       "slot bytes" each
//   note    text                                  a warning for the log
//   bye     dropped_lines flushed
#pragma once

#include <array>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agents.h"
#include "console.h"
#include "process.h"
#include "pump.h"
#include "wire.h"

namespace launcher::guardian {

class Guardian {
 public:
  Guardian(int command_fd, int event_fd, pid_t supervisor);
  Guardian(const Guardian&) = delete;
  Guardian& operator=(const Guardian&) = delete;
  ~Guardian() = delete;  // run() ends the process: a pump may hang in a dead disk, and nothing must wait for it

  [[noreturn]] void run();

 private:
  using Clock = std::chrono::steady_clock;

  struct Rank {
    pid_t pid = 0;  // 0: not (or no longer) running
    bool stopped = false;
    int connection = 0;  // the agent that it stands for; 0: none
    std::unique_ptr<RankPump> pump;
  };
  // A fork that the zygote has not been told of (in full). Owns the two descriptors.
  struct ForkOrder {
    int slot = 0;
    std::string frame;
    std::size_t sent = 0;
    std::array<int, 2> fds{-1, -1};
  };
  enum class SweepStage { kNone, kTerm, kKill };
  struct Sweep {
    SweepStage stage = SweepStage::kNone;
    Clock::time_point deadline{};
    std::map<pid_t, std::string> killed;
  };

  void add_watch(int fd, unsigned events);
  void send(const Fields& fields);
  void flush_events();
  void read_commands();
  void handle(const Fields& fields);
  void spawn_command(FieldCursor& cursor);
  void queue_fork(int slot, const SpawnRequest& request);
  void flush_forks();
  void drop_forks();
  void read_zygote();
  void add_note(std::string text);
  void listen_command(const std::string& path);
  void signal_command(int slot, int number);
  void say(int stream, const std::string& text);
  void send_stats();

  void reap();
  bool adopt_exit(pid_t pid, int how, int value);
  [[nodiscard]] Rank* find_rank(pid_t pid, int& slot);

  void begin_sweep(std::chrono::milliseconds term);
  void step_sweep();
  void kill_pass();
  [[nodiscard]] int poll_timeout() const;
  [[nodiscard]] pid_t spared() const;  // the zygote outlives a sweep between two attempts

  [[noreturn]] void abandon();
  [[noreturn]] void quit();

  const int command_fd_;
  const int event_fd_;
  const pid_t supervisor_;
  int epoll_fd_;
  int child_fd_;
  int supervisor_fd_;
  int note_fd_;
  int zygote_fd_ = -1;
  pid_t zygote_pid_ = 0;
  bool zygote_ready_ = false;
  std::deque<ForkOrder> fork_queue_;
  int forks_pending_ = 0;  // ordered, and not heard of yet
  int broadcast_ = 0;      // the stop signal that this attempt's ranks were sent
  bool quitting_ = false;
  FrameReader commands_;
  std::string outbox_;
  std::mutex notes_mutex_;
  std::vector<std::string> notes_;
  std::uint64_t cap_bytes_ = 0;
  bool raw_ = false;
  std::unique_ptr<Console> out_;
  std::unique_ptr<Console> err_;
  std::map<int, Rank> ranks_;
  std::vector<std::unique_ptr<RankPump>> retired_;
  Sweep sweep_;
  std::unique_ptr<AgentServer> agents_;  // none until it is asked for
};

}  // namespace launcher::guardian
