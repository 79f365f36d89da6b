// Agents and their server: requests with descriptors, who is let in, what is thrown out, how each side learns of the
// end.
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "agents.h"
#include "check.h"
#include "process.h"
#include "wire.h"

using namespace launcher::guardian;
using namespace std::chrono_literals;

namespace {

std::string folder;
std::string agent;  // path of the program

// A server, its events, and the loop that serves it.
struct Served {
  explicit Served(const std::string& name, pid_t root = ::getpid())
      : epoll_fd(::epoll_create1(EPOLL_CLOEXEC)),
        path(folder + "/" + name),
        server(epoll_fd, root, [this](const Fields& fields) { events.push_back(fields); }) {
    ::unlink(path.c_str());
    server.listen(path);
  }
  ~Served() { ::close(epoll_fd); }

  // Serves until an event `verb` has come; returns it, or nothing after ten seconds.
  Fields wait_for(const std::string& verb) {
    const auto deadline = std::chrono::steady_clock::now() + 10s;
    while (std::chrono::steady_clock::now() < deadline) {
      for (std::size_t i = 0; i < events.size(); ++i) {
        if (events[i].front() != verb) continue;
        Fields found = events[i];
        events.erase(events.begin() + static_cast<std::ptrdiff_t>(i));
        return found;
      }
      epoll_event event{};
      if (::epoll_wait(epoll_fd, &event, 1, 100) == 1) server.serve(event.data.fd);
    }
    return {};
  }

  int epoll_fd;
  std::string path;
  std::vector<Fields> events;
  AgentServer server;
};

pid_t start_agent(const std::string& path, const std::vector<std::string>& words,
                  const std::vector<std::string>& more = {}, const std::vector<Inherited>& inherited = {},
                  int out_fd = STDERR_FILENO) {
  SpawnRequest request;
  request.argv = {agent};
  request.argv.insert(request.argv.end(), words.begin(), words.end());
  request.environment = {"LAUNCHER_AGENT_SOCKET=" + path, "COLOUR=green"};
  request.environment.insert(request.environment.end(), more.begin(), more.end());
  request.directory = "/usr";
  request.out_fd = request.err_fd = out_fd;
  request.inherited = inherited;
  return spawn(request).pid;
}

int exit_code(pid_t pid) {
  int status = 0;
  CHECK(::waitpid(pid, &status, 0) == pid && WIFEXITED(status));
  return WEXITSTATUS(status);
}

int connect_to(const std::string& path) {
  const SocketAddress place(path);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(static_cast<void*>(address.sun_path), place.text.c_str(), place.text.size() + 1);
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? fd : -1;
}

// Runs `child` in a forked process, which then ends with 0.
template <typename Child>
pid_t forked(Child child) {
  std::fflush(stdout);
  const pid_t pid = ::fork();
  if (pid == 0) {
    child();
    ::_exit(0);
  }
  return pid;
}

// Waits for the other end to close; true if it did so within ten seconds.
bool closed_by_peer(int fd) {
  char byte = 0;
  pollfd wait{fd, POLLIN, 0};
  return ::poll(&wait, 1, 10'000) == 1 && ::read(fd, &byte, 1) <= 0;
}

void an_agent_tells_all_and_ends_as_told() {
  Served served("agents");
  struct stat info{};
  CHECK(::stat(served.path.c_str(), &info) == 0 && (info.st_mode & 0777) == 0600);
  const pid_t pid = start_agent(served.path, {"-x", "algo-2", "exec \"a b\""});
  const Fields request = served.wait_for("request");
  FieldCursor cursor(request);
  CHECK(cursor.text("verb") == "request" && cursor.text("connection") == "1");
  CHECK(cursor.number("pid") == pid && cursor.number("parent") == ::getpid());
  CHECK(!cursor.text("parent_command").empty());
  CHECK(cursor.text("kind") == "rsh" && cursor.text("directory") == "/usr");
  CHECK((cursor.list("argv") == std::vector<std::string>{"-x", "algo-2", "exec \"a b\""}));
  CHECK(cursor.list("environment").at(1) == "COLOUR=green");
  CHECK(served.server.is_helper(pid) && served.server.descriptors(1).empty());
  served.server.end(1, 42, "");
  CHECK(exit_code(pid) == 42);
}

void a_text_is_said_on_stderr() {
  Served served("agents");
  std::array<int, 2> ends{};
  CHECK(::pipe2(ends.data(), O_CLOEXEC) == 0);
  const pid_t pid = start_agent(served.path, {"algo-2", "sh"}, {}, {}, ends[1]);
  ::close(ends[1]);
  CHECK(served.wait_for("request").size() > 1);
  served.server.end(1, 255, "refused:\nno such host");
  CHECK(exit_code(pid) == 255);
  std::array<char, 200> text{};
  const ssize_t got = ::read(ends[0], text.data(), text.size());
  CHECK(got > 0 &&
        std::string_view(text.data(), static_cast<std::size_t>(got)) == "[launcher] refused:\nno such host\n");
  ::close(ends[0]);
}

void the_descriptor_of_a_rank_reaches_its_child() {
  Served served("agents");
  std::array<int, 2> pair{};
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()) == 0);
  const pid_t pid = start_agent(served.path, {"--rank"}, {"PMI_FD=8"}, {{pair[1], 8}});
  ::close(pair[1]);
  const Fields request = served.wait_for("request");
  CHECK(request.size() > 5 && request[5] == "rank");
  const auto& inherited = served.server.descriptors(1);
  CHECK(inherited.size() == 1 && inherited.at(0).number == 8);
  SpawnRequest child;
  child.argv = {"/bin/sh", "-c", "echo hello >&8; exit 3"};
  child.environment = {"PATH=/usr/bin:/bin"};
  child.out_fd = child.err_fd = STDERR_FILENO;
  child.inherited = inherited;
  const SpawnResult started = spawn(child);
  CHECK(started.pid > 0 && exit_code(started.pid) == 3);
  served.server.close_descriptors(1);
  std::array<char, 16> text{};
  CHECK(::read(pair[0], text.data(), text.size()) == 6 && std::string_view(text.data()) == "hello\n");
  // Nobody else holds it: not this process, and not the agent, which lives on.
  CHECK(closed_by_peer(pair[0]));
  ::close(pair[0]);
  served.server.end(1, 0, "");
  CHECK(exit_code(pid) == 0);
}

void descriptors_may_cross() {
  std::array<int, 2> first{};
  std::array<int, 2> second{};
  CHECK(::pipe2(first.data(), O_CLOEXEC) == 0 && ::pipe2(second.data(), O_CLOEXEC) == 0);
  SpawnRequest child;
  child.argv = {"/bin/sh", "-c",
                "echo one >&" + std::to_string(second[1]) + "; echo two >&" + std::to_string(first[1])};
  child.environment = {"PATH=/usr/bin:/bin"};
  child.out_fd = child.err_fd = STDERR_FILENO;
  child.inherited = {{first[1], second[1]}, {second[1], first[1]}};
  const SpawnResult started = spawn(child);
  CHECK(started.pid > 0 && exit_code(started.pid) == 0);
  std::array<char, 8> text{};
  CHECK(::read(first[0], text.data(), text.size()) == 4 && std::string_view(text.data(), 4) == "one\n");
  CHECK(::read(second[0], text.data(), text.size()) == 4 && std::string_view(text.data(), 4) == "two\n");
  child.argv[0] = "/no/such/program";  // a failure is still reported, whatever numbers were asked for
  CHECK(spawn(child).error == ENOENT);
  for (const int fd : {first[0], first[1], second[0], second[1]}) ::close(fd);
}

void signals_are_told_and_an_end_is_noticed() {
  Served served("agents");
  const pid_t pid = start_agent(served.path, {"--rank"});
  CHECK(served.wait_for("request").size() > 1);
  ::kill(pid, SIGTERM);
  CHECK((served.wait_for("agent_signal") == Fields{"agent_signal", "1", std::to_string(SIGTERM)}));
  ::kill(pid, SIGUSR1);
  CHECK((served.wait_for("agent_signal") == Fields{"agent_signal", "1", std::to_string(SIGUSR1)}));
  ::kill(pid, SIGKILL);
  CHECK((served.wait_for("hangup") == Fields{"hangup", "1", "gone"}));
  CHECK(::waitpid(pid, nullptr, 0) == pid);
  served.server.end(1, 0, "");  // of a connection that is no more
}

void an_agent_whose_parent_ends_says_so() {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  Served served("agents");
  std::array<int, 2> gate{};
  CHECK(::pipe2(gate.data(), O_CLOEXEC) == 0);
  const pid_t parent = forked([&] {
    const pid_t child = ::fork();
    if (child == 0) {
      ::setenv("LAUNCHER_AGENT_SOCKET", served.path.c_str(), 1);
      ::execl(agent.c_str(), agent.c_str(), "--rank", nullptr);
      ::_exit(127);
    }
    char byte = 0;
    static_cast<void>(!::read(gate[0], &byte, 1));
  });
  CHECK(served.wait_for("request").size() > 1);
  CHECK(::write(gate[1], "x", 1) == 1);
  CHECK((served.wait_for("hangup") == Fields{"hangup", "1", "orphaned"}));
  int status = 0;
  while (::waitpid(-1, &status, 0) > 0) {
  }
  CHECK(!served.server.is_helper(::getpid()) && served.server.is_helper(parent));
  for (const int fd : gate) ::close(fd);
}

void a_stranger_is_not_served() {
  // Only descendants of process `root` are; here that is a child with none.
  const pid_t other = forked([] { ::pause(); });
  Served served("agents", other);
  const int fd = connect_to(served.path);
  CHECK(fd >= 0);
  const Fields note = served.wait_for("note");
  CHECK(note.size() == 2 && note[1].find("is no process of this job") != std::string::npos);
  CHECK(closed_by_peer(fd));
  ::close(fd);
  ::kill(other, SIGKILL);
  ::waitpid(other, nullptr, 0);
}

void garbage_is_thrown_out() {
  std::string oversized("\xff\xff\xff\x7f");
  std::string unknown;
  append_frame(unknown, {"hello", "there"});
  std::string short_request;
  append_frame(short_request, {"request", "rank", "/", "0", "5", "one"});
  std::string bad_number;
  append_frame(bad_number, {"request", "rank", "/", "1", "11", "0", "0"});  // announces what it does not bring
  for (const auto& bytes : {oversized, unknown, short_request, bad_number}) {
    Served served("agents");
    const pid_t pid = forked([&] {
      const int fd = connect_to(served.path);
      static_cast<void>(!::write(fd, bytes.data(), bytes.size()));
      ::_exit(closed_by_peer(fd) ? 7 : 1);
    });
    const Fields note = served.wait_for("note");
    CHECK(note.size() == 2 && note[1].find("(garbage)") != std::string::npos);
    CHECK(exit_code(pid) == 7 && served.events.empty());
  }
}

void a_long_path_is_reached_through_its_directory() {
  const std::string deep = folder + "/" + std::string(120, 'd');
  ::mkdir(deep.c_str(), 0700);
  Served served(std::string(120, 'd') + "/agents");
  const pid_t pid = start_agent(served.path, {"--rank"});
  CHECK(served.wait_for("request").size() > 1);
  served.server.end(1, 0, "");
  CHECK(exit_code(pid) == 0);
  served.server.unlink_socket();
  CHECK(::access(served.path.c_str(), F_OK) != 0);
  CHECK_THROWS(std::system_error, served.server.listen(served.path));
}

void an_agent_without_a_server_fails() {
  const int null = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
  CHECK(exit_code(start_agent(folder + "/nobody", {"--rank"}, {}, {}, null)) == 255);
  SpawnRequest request;
  request.argv = {agent, "--rank"};
  request.out_fd = request.err_fd = null;
  CHECK(exit_code(spawn(request).pid) == 64);
  ::close(null);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 64;
  folder = argv[1];
  agent = argv[2];
  ::signal(SIGPIPE, SIG_IGN);
  check::run("an_agent_tells_all_and_ends_as_told", an_agent_tells_all_and_ends_as_told);
  check::run("a_text_is_said_on_stderr", a_text_is_said_on_stderr);
  check::run("the_descriptor_of_a_rank_reaches_its_child", the_descriptor_of_a_rank_reaches_its_child);
  check::run("descriptors_may_cross", descriptors_may_cross);
  check::run("signals_are_told_and_an_end_is_noticed", signals_are_told_and_an_end_is_noticed);
  check::run("an_agent_whose_parent_ends_says_so", an_agent_whose_parent_ends_says_so);
  check::run("a_stranger_is_not_served", a_stranger_is_not_served);
  check::run("garbage_is_thrown_out", garbage_is_thrown_out);
  check::run("a_long_path_is_reached_through_its_directory", a_long_path_is_reached_through_its_directory);
  check::run("an_agent_without_a_server_fails", an_agent_without_a_server_fails);
  return check::failures == 0 ? 0 : 1;
}
