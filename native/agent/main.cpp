// Usage: _agent --rank                 in place of a rank: its daemon starts it, the supervisor starts the rank
//        _agent [ssh options] HOST ... in place of ssh: the supervisor starts the MPI daemon, on the host it is for
//
// Asks the guardian of this host, by the socket that LAUNCHER_AGENT_SOCKET names, waits, and ends as it is told: when
// what was started in its place has ended. See guardian/agents.h for the frames.
#include <fcntl.h>
#include <poll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

#include "agents.h"
#include "wire.h"

using namespace launcher::guardian;

namespace {

// What ssh ends with when it is ssh that failed.
constexpr int kFailed = 255;
constexpr std::array<int, 6> kForwarded{SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2};

[[noreturn]] void throw_errno(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

void send_all(int fd, std::string_view bytes, int passed_fd) {
  bool first = true;
  while (!bytes.empty()) {
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
    iovec body{const_cast<char*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    if (first && passed_fd >= 0) {  // a descriptor travels with the first byte
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &passed_fd, sizeof passed_fd);
    }
    const ssize_t sent = ::sendmsg(fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) throw_errno("sendmsg");
    first = false;
    bytes.remove_prefix(static_cast<std::size_t>(sent));
  }
}

void send_frame(int fd, const Fields& fields, int passed_fd = -1) {
  std::string frame;
  append_frame(frame, fields);
  send_all(fd, frame, passed_fd);
}

int connect_to(const char* path) {
  const SocketAddress place(path);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(static_cast<void*>(address.sun_path), place.text.c_str(), place.text.size() + 1);
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw_errno("socket");
  while (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    if (errno != EINTR) throw_errno("connect");
  }
  return fd;
}

// The connection to MPICH's process manager that this process has inherited for the rank; -1 for none.
int process_manager_fd() {
  const char* text = ::getenv("PMI_FD");
  if (text == nullptr) return -1;
  int fd = -1;
  const char* end = text + std::strlen(text);
  const auto parsed = std::from_chars(text, end, fd);
  return parsed.ec == std::errc{} && parsed.ptr == end && fd > STDERR_FILENO && ::fcntl(fd, F_GETFD) >= 0 ? fd : -1;
}

void request(int fd, int argc, char** argv, char** environment) {
  const bool rank = argc > 1 && std::string_view(argv[1]) == "--rank";
  const int passed = rank ? process_manager_fd() : -1;
  std::array<char, 4096> directory{};
  if (::getcwd(directory.data(), directory.size()) == nullptr) directory[0] = '\0';
  Fields fields{"request", rank ? "rank" : "rsh", directory.data()};
  if (passed >= 0) {
    fields.insert(fields.end(), {"1", std::to_string(passed)});
  } else {
    fields.emplace_back("0");
  }
  const int first = rank ? 2 : 1;
  fields.push_back(std::to_string(argc - first));
  for (int i = first; i < argc; ++i) fields.emplace_back(argv[i]);
  std::size_t count = 0;
  while (environment[count] != nullptr) ++count;
  fields.push_back(std::to_string(count));
  for (std::size_t i = 0; i < count; ++i) fields.emplace_back(environment[i]);
  send_frame(fd, fields, passed);
  // Kept open here it would hide the rank's end from the process manager.
  if (passed >= 0) ::close(passed);
}

[[noreturn]] void end_as(const Fields& fields) {
  FieldCursor cursor(fields);
  if (cursor.text("verb") != "end") throw std::invalid_argument("unexpected answer '" + fields.front() + "'");
  const int code = static_cast<int>(cursor.number("code"));
  const std::string& text = cursor.text("text");
  if (!text.empty()) std::fprintf(stderr, "[launcher] %s\n", text.c_str());
  ::_exit(code);
}

// `parent_fd`: a pidfd, or -1 where the kernel has none.
[[noreturn]] void serve(int fd, int signal_fd, int parent_fd) {
  FrameReader frames;
  for (;;) {
    std::array<pollfd, 3> waits{{{fd, POLLIN, 0}, {signal_fd, POLLIN, 0}, {parent_fd, POLLIN, 0}}};
    if (::poll(waits.data(), waits.size(), -1) < 0) {
      if (errno == EINTR) continue;
      throw_errno("poll");
    }
    if (waits[0].revents != 0) {
      std::array<char, 4096> buffer{};
      const ssize_t got = ::read(fd, buffer.data(), buffer.size());
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw_errno("read");
      if (got == 0) throw std::runtime_error("the launcher has closed the connection");
      frames.feed({buffer.data(), static_cast<std::size_t>(got)});
      if (const auto fields = frames.next()) end_as(*fields);
    }
    if (waits[1].revents != 0) {
      signalfd_siginfo info{};
      if (::read(signal_fd, &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
        send_frame(fd, {"signal", std::to_string(info.ssi_signo)});
      }
    }
    if (waits[2].revents != 0) {
      send_frame(fd, {"orphaned"});
      ::_exit(kFailed);
    }
  }
}

}  // namespace

int main(int argc, char** argv, char** environment) {
  const char* path = ::getenv("LAUNCHER_AGENT_SOCKET");
  if (argc < 2 || path == nullptr) {
    std::fprintf(stderr,
                 "usage: _agent --rank | [options] HOST COMMAND... (internal: started by mpirun for the launcher)\n");
    return 64;
  }
  sigset_t forwarded;
  sigemptyset(&forwarded);
  for (const int number : kForwarded) sigaddset(&forwarded, number);
  ::sigprocmask(SIG_SETMASK, &forwarded, nullptr);
  try {
    const int signal_fd = ::signalfd(-1, &forwarded, SFD_CLOEXEC);
    if (signal_fd < 0) throw_errno("signalfd");
    int parent_fd = -1;
#ifdef SYS_pidfd_open
    // Before the request: whoever has seen that may let the parent end.
    parent_fd = static_cast<int>(::syscall(SYS_pidfd_open, ::getppid(), 0));
#endif
    const int fd = connect_to(path);
    request(fd, argc, argv, environment);
    serve(fd, signal_fd, parent_fd);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "[launcher] agent: %s: %s\n", path, error.what());
    return kFailed;
  }
}
