#include "process.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <unordered_map>

namespace launcher::guardian {

namespace {

struct ChildError {
  int error;
  int step;
};
constexpr std::array<const char*, 6> kSteps{"fork", "dup2", "sched_setaffinity", "chdir", "execve", "prctl"};

std::vector<char*> pointers(const std::vector<std::string>& strings) {
  std::vector<char*> result;
  result.reserve(strings.size() + 1);
  for (const auto& text : strings) result.push_back(const_cast<char*>(text.c_str()));
  result.push_back(nullptr);
  return result;
}

// Everything here runs between fork and execve: async-signal-safe calls only, nothing allocates.
bool give_descriptors(const std::vector<Inherited>& inherited, std::vector<int>& room, int& report_fd) {
  int floor = 0;
  for (const auto& one : inherited) floor = std::max(floor, one.number + 1);
  // First out of the way: a number that is wanted may be the present one of another, or of the report's pipe.
  if ((report_fd = ::fcntl(report_fd, F_DUPFD_CLOEXEC, floor)) < 0) return false;
  for (std::size_t i = 0; i < inherited.size(); ++i) {
    if ((room[i] = ::fcntl(inherited[i].fd, F_DUPFD_CLOEXEC, floor)) < 0) return false;
  }
  for (std::size_t i = 0; i < inherited.size(); ++i) {
    if (::dup2(room[i], inherited[i].number) < 0) return false;
  }
  return true;
}

[[noreturn]] void become_child(const SpawnRequest& request, char* const* argv, char* const* environment, pid_t parent,
                               int report_fd, std::vector<int>& room) {
  const auto fail = [&report_fd](int step) {
    const ChildError report{errno, step};
    static_cast<void>(!::write(report_fd, &report, sizeof report));
    ::_exit(127);
  };
  ::setsid();
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) fail(5);
  if (::getppid() != parent) ::_exit(127);  // the parent died before prctl took effect
  if (!request.cpus.empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : request.cpus) CPU_SET(static_cast<unsigned>(cpu), &set);
    if (::sched_setaffinity(0, sizeof set, &set) != 0) fail(2);
  }
  if (::dup2(request.out_fd, STDOUT_FILENO) < 0 || ::dup2(request.err_fd, STDERR_FILENO) < 0) fail(1);
  if (request.extra_fd >= 0) {
    if (request.extra_fd == 3) {
      ::fcntl(3, F_SETFD, 0);
    } else if (::dup2(request.extra_fd, 3) < 0) {
      fail(1);
    }
  }
  if (!request.inherited.empty() && !give_descriptors(request.inherited, room, report_fd)) fail(1);
  if (!request.directory.empty() && ::chdir(request.directory.c_str()) != 0) fail(3);
  struct sigaction standard{};
  standard.sa_handler = SIG_DFL;
  for (int number = 1; number < NSIG; ++number) ::sigaction(number, &standard, nullptr);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::execve(argv[0], argv, environment);
  fail(4);
  ::_exit(127);
}

std::string read_small_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  std::array<char, 1024> buffer{};
  const ssize_t got = ::read(fd, buffer.data(), buffer.size());
  ::close(fd);
  return got > 0 ? std::string(buffer.data(), static_cast<std::size_t>(got)) : std::string{};
}

// Parses /proc/<pid>/stat, see proc(5). The command may itself hold blanks and brackets: its end is the last ')'.
bool parse_stat(std::string_view stat, ProcessInfo& info) {
  const auto open = stat.find('(');
  const auto close = stat.rfind(')');
  if (open == std::string_view::npos || close == std::string_view::npos || close + 4 > stat.size()) return false;
  info.command = stat.substr(open + 1, close - open - 1);
  info.state = stat[close + 2];
  std::string_view rest = stat.substr(close + 4);
  // `rest` begins at field 4 (ppid); starttime is field 22.
  for (int field = 4; field <= 22; ++field) {
    const auto end = rest.find(' ');
    const std::string_view text = rest.substr(0, end);
    if (field == 4) std::from_chars(text.data(), text.data() + text.size(), info.parent);
    if (field == 22) std::from_chars(text.data(), text.data() + text.size(), info.start_ticks);
    if (end == std::string_view::npos) return field == 22;
    rest.remove_prefix(end + 1);
  }
  return true;
}

}  // namespace

bool read_process(pid_t pid, ProcessInfo& info) {
  info.pid = pid;
  return parse_stat(read_small_file("/proc/" + std::to_string(pid) + "/stat"), info);
}

bool is_descendant(pid_t pid, pid_t root) {
  ProcessInfo info;
  // Bounded: the links are read at different times, and a cycle is conceivable.
  for (int hops = 0; hops < 1024 && pid > 1 && read_process(pid, info); ++hops) {
    if (info.parent == root) return true;
    pid = info.parent;
  }
  return false;
}

SpawnResult spawn(const SpawnRequest& request) {
  std::array<int, 2> report{};
  if (::pipe2(report.data(), O_CLOEXEC) != 0) return {-1, errno, "pipe2"};
  auto argv = pointers(request.argv);
  auto environment = pointers(request.environment);
  std::vector<int> room(request.inherited.size());
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) become_child(request, argv.data(), environment.data(), parent, report[1], room);
  const int fork_error = errno;
  ::close(report[1]);
  if (pid < 0) {
    ::close(report[0]);
    return {-1, fork_error, "fork"};
  }
  ChildError error{};
  ssize_t got = 0;
  do {
    got = ::read(report[0], &error, sizeof error);
  } while (got < 0 && errno == EINTR);
  ::close(report[0]);
  if (got == static_cast<ssize_t>(sizeof error)) {
    ::waitpid(pid, nullptr, 0);
    return {-1, error.error, kSteps[static_cast<std::size_t>(error.step)]};
  }
  return {pid, 0, ""};
}

std::vector<ProcessInfo> descendants(pid_t root, pid_t except) {
  std::vector<ProcessInfo> all;
  DIR* proc = ::opendir("/proc");
  if (proc == nullptr) return all;
  while (const dirent* entry = ::readdir(proc)) {
    pid_t pid = 0;
    const std::string_view name(entry->d_name);
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), pid);
    if (error != std::errc{} || end != name.data() + name.size()) continue;
    ProcessInfo info;
    if (read_process(pid, info)) all.push_back(std::move(info));
  }
  ::closedir(proc);

  std::unordered_map<pid_t, pid_t> parent_of;
  for (const auto& info : all) parent_of[info.pid] = info.parent;
  std::vector<ProcessInfo> found;
  for (auto& info : all) {
    if (info.pid == root || info.state == 'Z' || info.state == 'X') continue;
    pid_t ancestor = info.pid;
    // The links were read at different times: bound the walk, a cycle is conceivable.
    for (std::size_t hops = 0; hops <= all.size() && ancestor > 1 && ancestor != root; ++hops) {
      if (ancestor == except) break;
      const auto parent = parent_of.find(ancestor);
      ancestor = parent == parent_of.end() ? 0 : parent->second;
    }
    if (ancestor == root) found.push_back(std::move(info));
  }
  return found;
}

bool send_signal(const ProcessInfo& info, int signal_number) {
#ifdef SYS_pidfd_open
  const long pidfd = ::syscall(SYS_pidfd_open, info.pid, 0);
  if (pidfd >= 0) {
    ProcessInfo now;
    const bool same = read_process(info.pid, now) && now.start_ticks == info.start_ticks;
    const bool sent = same && ::syscall(SYS_pidfd_send_signal, pidfd, signal_number, nullptr, 0) == 0;
    ::close(static_cast<int>(pidfd));
    return sent;
  }
  if (errno == ESRCH) return false;
#endif
  // Kernels before 5.3, and sandboxes that block pidfd_open: a reused pid is then possible in theory.
  return ::kill(info.pid, signal_number) == 0;
}

bool has_no_children(pid_t except) {
  if (except == 0) {
    siginfo_t info{};
    return ::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 && errno == ECHILD;
  }
  // Needs CONFIG_PROC_CHILDREN, which every distribution sets; without it the answer is a scan.
  const std::string path = "/proc/self/task/" + std::to_string(::getpid()) + "/children";
  if (::access(path.c_str(), R_OK) != 0) return descendants(::getpid(), except).empty();
  return read_small_file(path) == std::to_string(except) + " ";
}

char process_state(pid_t pid) {
  ProcessInfo info;
  return read_process(pid, info) ? info.state : '?';
}

std::string wait_channel(pid_t pid) { return read_small_file("/proc/" + std::to_string(pid) + "/wchan"); }

}  // namespace launcher::guardian
