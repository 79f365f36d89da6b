// The guardian's side of agents: the stand-ins that mpirun and its daemons start in place of ssh and of the ranks.
//
// An agent (native/agent) connects to a UNIX socket, says what was to be run, and lives for as long as what the
// supervisor starts in its place. So a rank is a child of the guardian like any other, while mpirun sees a child of its
// own. Frames are those of wire.h. Agent to guardian:
//   request  kind directory numbers[] argv[] environment[]
//            kind: rsh (argv are the arguments meant for ssh) | rank. With SCM_RIGHTS the descriptors come that the
//            rank needs (PMI_FD); `numbers` are those that it expects them under.
//   signal   number                       somebody signalled the agent; it lives on
//   orphaned -                            the process that started the agent has ended
// Guardian to agent:
//   end      code text                    say `text`, if there is any, and end with `code`
#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "process.h"
#include "wire.h"

namespace launcher::guardian {

// Not thread-safe; the descriptors that it watches are in the epoll set it is given.
class AgentServer {
 public:
  using Emit = std::function<void(const Fields&)>;  // takes an event for the supervisor

  // Only descendants of `root`, of this user, are served.
  AgentServer(int epoll_fd, pid_t root, Emit emit);
  AgentServer(const AgentServer&) = delete;
  AgentServer& operator=(const AgentServer&) = delete;
  ~AgentServer();

  // Listens at `path` (mode 0600), which may be longer than a socket address can hold. Throws std::system_error.
  void listen(const std::string& path);
  void unlink_socket();

  // Serves `fd` if it is one of this server's; false if not.
  bool serve(int fd);

  // The descriptors that came with a request, for the child to inherit; they stay open until close_descriptors().
  [[nodiscard]] const std::vector<Inherited>& descriptors(int connection) const;
  void close_descriptors(int connection);

  // Lets the agent print `text` and end with `code`; its connection is forgotten.
  void end(int connection, int code, const std::string& text);

  // An agent, or the process that started one.
  [[nodiscard]] bool is_helper(pid_t pid) const { return helpers_.contains(pid); }

 private:
  struct Connection {
    int number = 0;
    pid_t pid = 0;
    bool asked = false;
    FrameReader frames;
    std::vector<Inherited> inherited;
  };

  void accept_one();
  void read(int fd);
  void take(Connection& connection, const Fields& fields);
  void hang_up(int fd, const char* cause);
  void forget(int fd);
  [[nodiscard]] int find(int connection) const;

  const int epoll_fd_;
  const pid_t root_;
  const Emit emit_;
  std::string path_;
  int listen_fd_ = -1;
  int spare_fd_;  // given up to take and refuse a connection when the limit of open files is reached
  int last_number_ = 0;
  std::map<int, Connection> connections_;  // by descriptor
  std::set<pid_t> helpers_;
};

// A socket address for `path`. One that is too long is reached through its directory, opened as `directory_fd`, which
// the caller closes after use (-1 if it was not needed). Throws std::system_error.
struct SocketAddress {
  explicit SocketAddress(const std::string& path);
  SocketAddress(const SocketAddress&) = delete;
  SocketAddress& operator=(const SocketAddress&) = delete;
  ~SocketAddress();
  std::string text;
  int directory_fd = -1;
};

}  // namespace launcher::guardian
