// Starting, finding and killing processes. Linux only: /proc, prctl(2), signalfd(2).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace launcher::guardian {

// A descriptor that a child gets, under the number that it expects it under.
struct Inherited {
  int fd = -1;
  int number = -1;
};

struct SpawnRequest {
  std::vector<std::string> argv;  // argv[0] is an absolute path
  std::vector<std::string> environment;
  std::string directory;  // "" keeps the guardian's
  std::vector<int> cpus;  // empty keeps the inherited affinity
  int out_fd = -1;
  int err_fd = -1;
  int extra_fd = -1;  // becomes descriptor 3 of the child; -1 for none
  std::vector<Inherited> inherited;
};

struct SpawnResult {
  pid_t pid = -1;
  int error = 0;          // errno, when pid is -1
  const char* step = "";  // the call that failed
};

// Starts a child as leader of a session of its own, with default signal handling, that dies with its parent thread
// (PR_SET_PDEATHSIG). Returns once execve has succeeded or failed.
SpawnResult spawn(const SpawnRequest& request);

struct ProcessInfo {
  pid_t pid = 0;
  pid_t parent = 0;
  char state = '?';
  std::uint64_t start_ticks = 0;  // since boot; pid and start together name one process for ever
  std::string command;            // comm, at most 15 characters
};

// Living descendants of `root` (zombies left out), by the parent links in /proc. `root` must be a child subreaper, or
// orphans are missed. The subtree of `except` is left out when it is not 0.
std::vector<ProcessInfo> descendants(pid_t root, pid_t except);

// Sends a signal to exactly the process that `info` names, also when its pid has been reused meanwhile.
bool send_signal(const ProcessInfo& info, int signal_number);

// True when `root`, the calling process, has no child at all besides `except`. One system call.
bool has_no_children(pid_t except);

// Reads /proc/pid/stat. False when there is no such process.
bool read_process(pid_t pid, ProcessInfo& info);

// Whether `pid` is a living descendant of `root`, a child subreaper.
bool is_descendant(pid_t pid, pid_t root);

// The state letter of /proc/pid/stat: R, S, D, T (stopped), t (traced), Z, ...; '?' when there is no such process.
char process_state(pid_t pid);

// What the kernel says a process waits in (/proc/pid/wchan), "" when it does not tell.
std::string wait_channel(pid_t pid);

}  // namespace launcher::guardian
