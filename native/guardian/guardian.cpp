#include "guardian.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace launcher::guardian {

namespace {

constexpr int kAllRanks = -2;
constexpr int kZygote = -1;
constexpr std::chrono::milliseconds kDrainLimit{200};
// A process that SIGKILL does not end within this time sits in an uninterruptible wait; it is named and left.
constexpr std::chrono::seconds kKillLimit{5};
constexpr std::chrono::milliseconds kFlushLimit{2000};

[[noreturn]] void throw_errno(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

long long monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<long long>(now.tv_sec) * 1'000'000'000LL + now.tv_nsec;
}

long long microseconds(const timeval& time) { return static_cast<long long>(time.tv_sec) * 1'000'000LL + time.tv_usec; }

template <typename T>
std::string str(T value) {
  return std::to_string(value);
}

}  // namespace

Guardian::Guardian(int command_fd, int event_fd, pid_t supervisor)
    : command_fd_(command_fd), event_fd_(event_fd), supervisor_(supervisor) {
  // Out of the terminal's process group: Ctrl-C is for the supervisor, which decides what it means.
  ::setsid();
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  ::prctl(PR_SET_NAME, "launcher-guard");
  for (const int fd : {command_fd_, event_fd_}) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  for (const int fd : {command_fd_, event_fd_}) ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  sigset_t all;
  sigfillset(&all);
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, number);
  ::sigprocmask(SIG_SETMASK, &all, nullptr);
  struct sigaction standard{};
  standard.sa_handler = SIG_DFL;  // an inherited SIG_IGN for SIGCHLD would lose the ends of the ranks
  ::sigaction(SIGCHLD, &standard, nullptr);
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  if ((child_fd_ = ::signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK)) < 0) throw_errno("signalfd");
  if ((epoll_fd_ = ::epoll_create1(EPOLL_CLOEXEC)) < 0) throw_errno("epoll_create1");
  if ((note_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) throw_errno("eventfd");
  for (const int fd : {command_fd_, child_fd_, note_fd_}) add_watch(fd, EPOLLIN);
#ifdef SYS_pidfd_open
  supervisor_fd_ = static_cast<int>(::syscall(SYS_pidfd_open, supervisor_, 0));
#else
  supervisor_fd_ = -1;
  errno = ENOSYS;
#endif
  if (supervisor_fd_ >= 0) {
    ::fcntl(supervisor_fd_, F_SETFD, FD_CLOEXEC);
    add_watch(supervisor_fd_, EPOLLIN);
  } else {
    send({"note", "pidfd_open is not available here (" + std::string(std::strerror(errno)) +
                      "); using SIGCHLD and the end of the control pipe instead"});
  }
}

void Guardian::add_watch(int fd, unsigned events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) throw_errno("epoll_ctl");
}

void Guardian::run() {
  if (::getppid() != supervisor_) abandon();
  for (;;) {
    std::array<epoll_event, 8> events{};
    const int count = ::epoll_wait(epoll_fd_, events.data(), static_cast<int>(events.size()), poll_timeout());
    for (int i = 0; i < count; ++i) {
      const int fd = events[static_cast<std::size_t>(i)].data.fd;
      if (fd == child_fd_) {
        std::array<signalfd_siginfo, 16> seen{};
        static_cast<void>(!::read(child_fd_, seen.data(), sizeof seen));
      } else if (fd == note_fd_) {
        std::uint64_t ignored = 0;
        static_cast<void>(!::read(note_fd_, &ignored, sizeof ignored));
        const std::lock_guard lock(notes_mutex_);
        for (auto& note : notes_) send({"note", as_field(note)});
        notes_.clear();
      } else if (fd == zygote_fd_) {
        if ((events[static_cast<std::size_t>(i)].events & ~static_cast<unsigned>(EPOLLOUT)) != 0) read_zygote();
        flush_forks();
      } else if (fd == command_fd_) {
        read_commands();
      } else if (fd == supervisor_fd_) {
        abandon();
      } else if (agents_) {
        agents_->serve(fd);
      }
    }
    reap();
    step_sweep();
    flush_events();
  }
}

int Guardian::poll_timeout() const {
  if (!outbox_.empty()) return 5;
  switch (sweep_.stage) {
    case SweepStage::kNone:
      return -1;
    case SweepStage::kTerm:
      return static_cast<int>(
          std::max<long long>(0, std::chrono::ceil<std::chrono::milliseconds>(sweep_.deadline - Clock::now()).count()));
    case SweepStage::kKill:
      return 10;  // between two passes over the process table; SIGCHLD wakes sooner
  }
  return -1;
}

void Guardian::send(const Fields& fields) { append_frame(outbox_, fields); }

void Guardian::flush_events() {
  while (!outbox_.empty()) {
    const ssize_t written = ::write(event_fd_, outbox_.data(), outbox_.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) return;  // the supervisor is busy; poll_timeout() comes back soon
      abandon();
    }
    outbox_.erase(0, static_cast<std::size_t>(written));
  }
}

void Guardian::read_commands() {
  std::array<char, 65536> buffer{};
  for (;;) {
    const ssize_t got = ::read(command_fd_, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) break;
    if (got <= 0) abandon();
    commands_.feed({buffer.data(), static_cast<std::size_t>(got)});
  }
  while (const auto fields = commands_.next()) handle(*fields);
}

void Guardian::handle(const Fields& fields) {
  FieldCursor cursor(fields);
  const std::string verb = cursor.text("verb");
  if (verb == "spawn") {
    spawn_command(cursor);
  } else if (verb == "signal") {
    const int slot = static_cast<int>(cursor.number("slot"));
    signal_command(slot, static_cast<int>(cursor.number("number")));
  } else if (verb == "sweep") {
    begin_sweep(std::chrono::milliseconds(cursor.number("term_ms")));
  } else if (verb == "say") {
    const int stream = static_cast<int>(cursor.number("stream"));
    say(stream, cursor.text("text"));
  } else if (verb == "listen") {
    listen_command(cursor.text("path"));
  } else if (verb == "reply") {
    const int connection = static_cast<int>(cursor.number("connection"));
    const int code = static_cast<int>(cursor.number("code"));
    if (agents_) agents_->end(connection, code, cursor.text("text"));
  } else if (verb == "stats") {
    send_stats();
  } else if (verb == "hello") {
    cap_bytes_ = static_cast<std::uint64_t>(cursor.number("cap_bytes"));
    raw_ = cursor.number("raw") != 0;
    const auto note = [this](std::string text) { add_note(std::move(text)); };
    out_ = std::make_unique<Console>(STDOUT_FILENO, note);
    err_ = std::make_unique<Console>(STDERR_FILENO, note);
  } else if (verb == "quit") {
    quit();
  } else {
    throw std::invalid_argument("unknown command '" + verb + "'");
  }
}

void Guardian::spawn_command(FieldCursor& cursor) {
  const std::string kind = cursor.text("kind");
  const int slot = static_cast<int>(cursor.number("slot"));
  SpawnRequest request;
  request.directory = cursor.text("directory");
  StreamOptions out;
  StreamOptions err;
  out.path = cursor.text("out_path");
  err.path = cursor.text("err_path");
  const long console = cursor.number("console");
  if ((console & 1) != 0) out.console = out_.get();
  if ((console & 2) != 0) err.console = err_.get();
  const std::string prefix = cursor.text("prefix");
  for (const auto& cpu : cursor.list("cpus")) request.cpus.push_back(std::stoi(cpu));
  request.argv = cursor.list("argv");
  request.environment = cursor.list("environment");
  const int connection = static_cast<int>(cursor.number("connection"));
  if (connection != 0 && agents_) request.inherited = agents_->descriptors(connection);

  std::array<int, 2> out_pipe{-1, -1};
  std::array<int, 2> err_pipe{-1, -1};
  std::array<int, 2> control{-1, -1};
  if (::pipe2(out_pipe.data(), O_CLOEXEC) != 0 || ::pipe2(err_pipe.data(), O_CLOEXEC) != 0 ||
      (kind == "zygote" && ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control.data()) != 0)) {
    send({"spawn_failed", str(slot), str(errno), "pipe2"});
    for (const int fd : {out_pipe[0], out_pipe[1], err_pipe[0], err_pipe[1]}) {
      if (fd >= 0) ::close(fd);
    }
    return;
  }
  request.out_fd = out_pipe[1];
  request.err_fd = err_pipe[1];
  request.extra_fd = control[1];
  out.pipe_fd = out_pipe[0];
  err.pipe_fd = err_pipe[0];

  Rank& rank = ranks_[slot];
  if (rank.pump) {
    rank.pump->request_stop();
    retired_.push_back(std::move(rank.pump));
  }
  std::erase_if(retired_, [](const auto& pump) { return pump->ended(); });
  rank = Rank{};
  try {
    rank.pump = std::make_unique<RankPump>(slot, prefix, raw_ && slot >= kZygote, cap_bytes_, std::move(out),
                                           std::move(err), [this](std::string text) { add_note(std::move(text)); });
    if (kind == "fork") {
      queue_fork(slot, request);
    } else {
      const SpawnResult result = spawn(request);
      if (result.pid < 0) {
        send({"spawn_failed", str(slot), str(result.error), result.step});
      } else {
        rank.pid = result.pid;
        rank.connection = connection;
        if (agents_) agents_->close_descriptors(connection);
        send({"started", str(slot), str(result.pid), str(monotonic_ns())});
      }
    }
  } catch (const std::system_error& error) {
    // what() is "call: reason"; the reason travels as the number.
    const std::string what = error.what();
    send({"spawn_failed", str(slot), str(error.code().value()), as_field(what.substr(0, what.find(": ")))});
  }
  ::close(out_pipe[1]);
  ::close(err_pipe[1]);
  if (kind == "zygote") {
    ::close(control[1]);
    zygote_fd_ = control[0];
    zygote_pid_ = rank.pid;
    zygote_ready_ = false;
    ::fcntl(zygote_fd_, F_SETFL, O_NONBLOCK);
    add_watch(zygote_fd_, EPOLLIN);
  }
}

void Guardian::listen_command(const std::string& path) {
  try {
    if (!agents_) {
      agents_ = std::make_unique<AgentServer>(epoll_fd_, ::getpid(), [this](const Fields& fields) { send(fields); });
    }
    agents_->listen(path);
    send({"listening", "0", ""});
  } catch (const std::system_error& error) {
    const std::string what = error.what();
    send({"listening", str(error.code().value()), as_field(what.substr(0, what.find(": ")))});
  }
}

void Guardian::add_note(std::string text) {
  const std::lock_guard lock(notes_mutex_);
  notes_.push_back(std::move(text));
  const std::uint64_t one = 1;
  static_cast<void>(!::write(note_fd_, &one, sizeof one));
}

// The order goes out when the zygote has finished its imports: nothing here may wait for it, it may never finish.
void Guardian::queue_fork(int slot, const SpawnRequest& request) {
  if (zygote_fd_ < 0) throw std::system_error(ESRCH, std::generic_category(), "no preload process");
  Fields fields{str(slot), request.directory, str(request.cpus.size())};
  for (const int cpu : request.cpus) fields.push_back(str(cpu));
  fields.push_back(str(request.argv.size()));
  fields.insert(fields.end(), request.argv.begin(), request.argv.end());
  fields.push_back(str(request.environment.size()));
  fields.insert(fields.end(), request.environment.begin(), request.environment.end());
  ForkOrder order;
  order.slot = slot;
  append_frame(order.frame, fields);
  order.fds = {::fcntl(request.out_fd, F_DUPFD_CLOEXEC, 0), ::fcntl(request.err_fd, F_DUPFD_CLOEXEC, 0)};
  const int error = errno;
  fork_queue_.push_back(std::move(order));
  if (fork_queue_.back().fds[0] < 0 || fork_queue_.back().fds[1] < 0) {
    for (const int fd : fork_queue_.back().fds) {
      if (fd >= 0) ::close(fd);
    }
    fork_queue_.pop_back();
    throw std::system_error(error, std::generic_category(), "fcntl");
  }
  flush_forks();
}

void Guardian::flush_forks() {
  if (zygote_fd_ < 0 || !zygote_ready_) return;
  bool blocked = false;
  while (!fork_queue_.empty() && !blocked) {
    ForkOrder& order = fork_queue_.front();
    alignas(cmsghdr) std::array<char, CMSG_SPACE(2 * sizeof(int))> control{};
    iovec body{order.frame.data() + order.sent, order.frame.size() - order.sent};
    msghdr message{};
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    if (order.sent == 0) {  // the descriptors travel with the first byte
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(2 * sizeof(int));
      std::memcpy(CMSG_DATA(header), order.fds.data(), 2 * sizeof(int));
    }
    const ssize_t sent = ::sendmsg(zygote_fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno != EAGAIN) return;  // the zygote is gone: its socket says so, and its exit
    blocked = sent < 0;
    if (sent > 0) order.sent += static_cast<std::size_t>(sent);
    if (order.sent == order.frame.size()) {
      for (const int fd : order.fds) ::close(fd);
      fork_queue_.pop_front();
      ++forks_pending_;
    }
  }
  epoll_event event{};
  event.events = blocked ? EPOLLIN | EPOLLOUT : EPOLLIN;
  event.data.fd = zygote_fd_;
  ::epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, zygote_fd_, &event);
}

// Takes back the orders that the zygote has not begun to read: the attempt is over.
void Guardian::drop_forks() {
  while (!fork_queue_.empty() && fork_queue_.back().sent == 0) {
    for (const int fd : fork_queue_.back().fds) ::close(fd);
    fork_queue_.pop_back();
  }
}

// The zygote says {-1, 0} when it is ready; a forked rank announces itself with {slot, pid} before anything else, and
// one that could not be forked is announced with {slot, -errno}. Native ints.
void Guardian::read_zygote() {
  std::array<int, 2> hello{};
  for (;;) {
    const ssize_t got = ::recv(zygote_fd_, hello.data(), sizeof hello, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got != static_cast<ssize_t>(sizeof hello)) break;
    const auto [slot, pid] = hello;
    if (slot == kZygote) {
      zygote_ready_ = true;
      continue;
    }
    if (forks_pending_ > 0) --forks_pending_;
    if (pid < 0) {
      send({"spawn_failed", str(slot), str(-pid), "fork"});
      continue;
    }
    ranks_[slot].pid = pid;
    send({"started", str(slot), str(pid), str(monotonic_ns())});
    if (broadcast_ != 0) ::kill(pid, broadcast_);  // the stop came before this rank
  }
  ::close(zygote_fd_);  // the zygote is gone; reap() reports how it ended
  zygote_fd_ = -1;
  zygote_ready_ = false;
  forks_pending_ = 0;
  for (auto& order : fork_queue_) {
    for (const int fd : order.fds) ::close(fd);
  }
  fork_queue_.clear();
}

void Guardian::signal_command(int slot, int number) {
  const bool stops = number == SIGTERM || number == SIGINT || number == SIGHUP || number == SIGQUIT;
  if (slot == kAllRanks && stops) broadcast_ = number;
  for (auto& [index, rank] : ranks_) {
    if (rank.pid == 0 || index == kZygote || (index < kZygote && slot != index) || (slot != kAllRanks && slot != index))
      continue;
    if (number != SIGCONT && process_state(rank.pid) == 'T') rank.stopped = true;
    ::kill(rank.pid, number);
    // A stopped rank would keep the signal pending for ever.
    if (rank.stopped && number != SIGSTOP && number != SIGTSTP) ::kill(rank.pid, SIGCONT);
  }
}

void Guardian::say(int stream, const std::string& text) {
  static const std::atomic<bool> patient{false};
  Console* console = stream == STDOUT_FILENO ? out_.get() : err_.get();
  if (console != nullptr) console->push(kAllRanks, text + "\n", 1, patient);
}

void Guardian::send_stats() {
  Fields fields{"stats", str(ranks_.size())};
  for (const auto& [slot, rank] : ranks_) fields.push_back(str(slot) + " " + str(rank.pump ? rank.pump->bytes() : 0U));
  fields.push_back(str((out_ ? out_->dropped_lines() : 0U) + (err_ ? err_->dropped_lines() : 0U)));
  send(fields);
}

Guardian::Rank* Guardian::find_rank(pid_t pid, int& slot) {
  for (auto& [index, rank] : ranks_) {
    if (rank.pid == pid) {
      slot = index;
      return &rank;
    }
  }
  return nullptr;
}

void Guardian::reap() {
  for (;;) {
    siginfo_t info{};
    // Without reaping: the zombie keeps its pid, and so its process group, from being reused.
    if (::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0) return;
    if (zygote_fd_ >= 0 && forks_pending_ > 0) read_zygote();
    if (!adopt_exit(info.si_pid, info.si_code, info.si_status)) ::waitpid(info.si_pid, nullptr, 0);
  }
}

bool Guardian::adopt_exit(pid_t pid, int how, int value) {
  int slot = 0;
  Rank* rank = find_rank(pid, slot);
  if (rank == nullptr) return false;  // an orphan that ended: reaped, nobody asks for its status
  const long long when = monotonic_ns();
  const bool failed = how != CLD_EXITED || value != 0;
  // A failed rank's helpers (loader workers) are of no use any more and may hold GPU memory.
  if (failed) ::kill(-pid, SIGKILL);
  const RankPump::Tails tails = rank->pump ? rank->pump->drain(kDrainLimit) : RankPump::Tails{};
  rusage usage{};
  int status = 0;
  ::wait4(pid, &status, 0, &usage);
  send({"exited", str(slot), str(pid), how == CLD_EXITED ? "exit" : "signal", str(value), str(when),
        str(usage.ru_maxrss), str(microseconds(usage.ru_utime)), str(microseconds(usage.ru_stime)),
        rank->stopped ? "1" : "0", as_field(tails.out), as_field(tails.err)});
  rank->pid = 0;
  // mpirun answers a failure by killing the job at once. The supervisor gives the other ranks their grace, and decides.
  if (!failed && rank->connection != 0 && agents_) agents_->end(rank->connection, 0, "");
  rank->connection = 0;
  if (slot == kZygote) zygote_pid_ = 0;
  return true;
}

pid_t Guardian::spared() const { return quitting_ ? 0 : zygote_pid_; }

void Guardian::begin_sweep(std::chrono::milliseconds term) {
  sweep_ = Sweep{};
  sweep_.stage = SweepStage::kTerm;
  drop_forks();
  sweep_.deadline = Clock::now() + term;
  if (term.count() > 0 && !has_no_children(spared())) {
    for (const auto& info : descendants(::getpid(), spared())) send_signal(info, SIGTERM);
  }
}

void Guardian::step_sweep() {
  if (sweep_.stage == SweepStage::kNone) return;
  const auto now = Clock::now();
  const bool forking = forks_pending_ > 0 || !fork_queue_.empty();
  if (!forking && has_no_children(spared())) {
    Fields fields{"empty", str(sweep_.killed.size())};
    for (const auto& [pid, command] : sweep_.killed) fields.push_back(str(pid) + " " + as_field(command));
    sweep_.stage = SweepStage::kNone;
    broadcast_ = 0;
    send(fields);
    return;
  }
  if (sweep_.stage == SweepStage::kTerm) {
    if (now < sweep_.deadline) return;
    sweep_.stage = SweepStage::kKill;
    sweep_.deadline = now + kKillLimit;
  } else if (now >= sweep_.deadline && forking && zygote_pid_ != 0) {
    ::kill(zygote_pid_, SIGKILL);  // it took an order and never answered; the end of its socket clears the rest
    sweep_.deadline = now + kKillLimit;
  } else if (now >= sweep_.deadline) {
    const auto survivors = descendants(::getpid(), spared());
    Fields fields{"stuck", str(survivors.size())};
    for (const auto& info : survivors) {
      const std::string channel = wait_channel(info.pid);
      fields.push_back(
          as_field(str(info.pid) + " " + info.state + " " + (channel.empty() ? "?" : channel) + " " + info.command));
    }
    sweep_.stage = SweepStage::kNone;
    broadcast_ = 0;
    send(fields);
    return;
  }
  kill_pass();
}

// Stops everything before killing anything: a process that is stopped cannot fork, so a fork bomb ends here too.
void Guardian::kill_pass() {
  std::map<pid_t, ProcessInfo> stopped;
  for (int round = 0; round < 16; ++round) {
    bool grew = false;
    for (auto& info : descendants(::getpid(), spared())) {
      if (stopped.contains(info.pid)) continue;
      send_signal(info, SIGSTOP);
      stopped.emplace(info.pid, std::move(info));
      grew = true;
    }
    if (!grew) break;
  }
  for (const auto& [pid, info] : stopped) {
    send_signal(info, SIGKILL);
    int slot = 0;
    if (find_rank(pid, slot) == nullptr && !(agents_ && agents_->is_helper(pid)))
      sweep_.killed.emplace(pid, info.command);
  }
}

void Guardian::abandon() {
  if (agents_) agents_->unlink_socket();
  // The supervisor is gone: nobody is left to decide anything, and no rank may outlive it.
  quitting_ = true;
  const auto deadline = Clock::now() + 2 * kKillLimit;
  while (!has_no_children(0) && Clock::now() < deadline) {
    for (const auto& [slot, rank] : ranks_) {
      if (rank.pid != 0) ::kill(rank.pid, SIGKILL);
    }
    kill_pass();
    while (::waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    const timespec pause{0, 5'000'000};
    ::sigtimedwait(&child, nullptr, &pause);
  }
  ::_exit(0);
}

void Guardian::quit() {
  quitting_ = true;
  if (agents_) agents_->unlink_socket();
  if (zygote_fd_ >= 0) {
    if (zygote_pid_ != 0) ::kill(zygote_pid_, SIGKILL);
    forks_pending_ = 0;
    fork_queue_.clear();  // the process ends: its descriptors are closed with it
  }
  begin_sweep(std::chrono::milliseconds(0));
  while (sweep_.stage != SweepStage::kNone) {
    reap();
    step_sweep();
    if (sweep_.stage == SweepStage::kNone) break;
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    const timespec pause{0, 5'000'000};
    ::sigtimedwait(&child, nullptr, &pause);
  }
  for (auto& [slot, rank] : ranks_) {
    if (!rank.pump) continue;
    rank.pump->drain(kDrainLimit);
    rank.pump->request_stop();
  }
  const auto deadline = Clock::now() + kFlushLimit;
  bool flushed = true;
  for (const auto& console : {out_.get(), err_.get()}) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    if (console != nullptr && !console->flush(std::max(left, std::chrono::milliseconds(0)))) flushed = false;
  }
  send({"bye", str((out_ ? out_->dropped_lines() : 0U) + (err_ ? err_->dropped_lines() : 0U)), flushed ? "1" : "0"});
  ::fcntl(event_fd_, F_SETFL, 0);
  flush_events();
  ::_exit(0);
}

}  // namespace launcher::guardian
