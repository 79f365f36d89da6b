#include "agents.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace launcher::guardian {

namespace {

constexpr std::size_t kMaxDescriptors = 8;
constexpr int kMaxNumber = 1 << 20;

[[noreturn]] void throw_errno(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

int open_spare() { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }

void close_all(std::vector<Inherited>& inherited) {
  for (const auto& one : inherited) ::close(one.fd);
  inherited.clear();
}

// Keeps what came with SCM_RIGHTS. False when there is more than a request may bring.
bool keep_descriptors(const msghdr& message, std::vector<Inherited>& inherited) {
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(const_cast<msghdr*>(&message), header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      inherited.push_back({fd, -1});
    }
  }
  return (message.msg_flags & MSG_CTRUNC) == 0 && inherited.size() <= kMaxDescriptors;
}

}  // namespace

SocketAddress::SocketAddress(const std::string& path) : text(path) {
  if (path.size() < sizeof(sockaddr_un{}.sun_path)) return;
  const auto slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  directory_fd = ::open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (directory_fd < 0) throw_errno("open");
  text = "/proc/self/fd/" + std::to_string(directory_fd) + "/" + path.substr(slash + 1);
  if (text.size() >= sizeof(sockaddr_un{}.sun_path)) {
    ::close(directory_fd);
    errno = ENAMETOOLONG;
    throw_errno("bind");
  }
}

SocketAddress::~SocketAddress() {
  if (directory_fd >= 0) ::close(directory_fd);
}

AgentServer::AgentServer(int epoll_fd, pid_t root, Emit emit)
    : epoll_fd_(epoll_fd), root_(root), emit_(std::move(emit)), spare_fd_(open_spare()) {}

AgentServer::~AgentServer() {
  while (!connections_.empty()) forget(connections_.begin()->first);
  if (listen_fd_ >= 0) ::close(listen_fd_);
  if (spare_fd_ >= 0) ::close(spare_fd_);
  unlink_socket();
}

void AgentServer::listen(const std::string& path) {
  if (listen_fd_ >= 0) throw std::system_error(EALREADY, std::generic_category(), "listen");
  const SocketAddress place(path);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(static_cast<void*>(address.sun_path), place.text.c_str(), place.text.size() + 1);
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) throw_errno("socket");
  // From its first moment nobody else may connect.
  const mode_t mask = ::umask(0177);
  const bool bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  const int bind_error = errno;
  ::umask(mask);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = fd;
  if (!bound || ::listen(fd, SOMAXCONN) != 0 || ::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
    const int error = bound ? errno : bind_error;
    ::close(fd);
    if (bound) ::unlink(place.text.c_str());
    throw std::system_error(error, std::generic_category(), bound ? "listen" : "bind");
  }
  listen_fd_ = fd;
  path_ = path;
}

void AgentServer::unlink_socket() {
  if (!path_.empty()) ::unlink(path_.c_str());
  path_.clear();
}

bool AgentServer::serve(int fd) {
  if (fd == listen_fd_ && fd >= 0) {
    accept_one();
    return true;
  }
  if (!connections_.contains(fd)) return false;
  read(fd);
  return true;
}

void AgentServer::accept_one() {
  const int fd = ::accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    if (errno != EMFILE && errno != ENFILE) return;
    // Left in the queue it would wake this loop for ever.
    ::close(std::exchange(spare_fd_, -1));
    const int refused = ::accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (refused >= 0) ::close(refused);
    spare_fd_ = open_spare();
    emit_({"note", "an MPI agent was refused: the limit of open files is reached: ulimit -n"});
    return;
  }
  ucred peer{};
  socklen_t size = sizeof peer;
  const bool known = ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0;
  if (!known || peer.uid != ::geteuid() || !is_descendant(peer.pid, root_)) {
    ::close(fd);
    emit_({"note", "a connection to the agents' socket was refused: pid " + std::to_string(peer.pid) + " of uid " +
                       std::to_string(peer.uid) + " is no process of this job"});
    return;
  }
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
    ::close(fd);
    return;
  }
  Connection& connection = connections_[fd];
  connection.number = ++last_number_;
  connection.pid = peer.pid;
}

void AgentServer::read(int fd) {
  std::array<char, 65536> buffer{};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxDescriptors * sizeof(int))> control{};
  for (;;) {
    iovec body{buffer.data(), buffer.size()};
    msghdr message{};
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = ::recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) return hang_up(fd, "gone");
    const auto found = connections_.find(fd);
    Connection& connection = found->second;
    if (!keep_descriptors(message, connection.inherited)) return hang_up(fd, "garbage");
    try {
      connection.frames.feed({buffer.data(), static_cast<std::size_t>(got)});
      while (const auto fields = connection.frames.next()) {
        if (fields->front() == "orphaned") return hang_up(fd, "orphaned");
        take(connection, *fields);
      }
    } catch (const std::exception&) {  // not one of our agents, or a broken one
      return hang_up(fd, "garbage");
    }
  }
}

void AgentServer::take(Connection& connection, const Fields& fields) {
  FieldCursor cursor(fields);
  const std::string& verb = cursor.text("verb");
  const std::string number = std::to_string(connection.number);
  if (verb == "signal") {
    const long signal_number = cursor.number("number");
    if (connection.asked) emit_({"agent_signal", number, std::to_string(signal_number)});
    return;
  }
  if (verb != "request" || connection.asked) throw std::invalid_argument("unexpected frame");
  const std::string& kind = cursor.text("kind");
  const std::string& directory = cursor.text("directory");
  const auto numbers = cursor.list("numbers");
  const auto argv = cursor.list("argv");
  const auto environment = cursor.list("environment");
  if ((kind != "rsh" && kind != "rank") || numbers.size() != connection.inherited.size()) {
    throw std::invalid_argument("bad request");
  }
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    int& wanted = connection.inherited[i].number;
    const char* end = numbers[i].data() + numbers[i].size();
    const auto parsed = std::from_chars(numbers[i].data(), end, wanted);
    if (parsed.ec != std::errc{} || parsed.ptr != end || wanted <= STDERR_FILENO || wanted >= kMaxNumber) {
      throw std::invalid_argument("bad descriptor number");
    }
  }
  connection.asked = true;
  ProcessInfo agent;
  ProcessInfo parent;
  if (read_process(connection.pid, agent)) static_cast<void>(read_process(agent.parent, parent));
  helpers_.insert(connection.pid);
  if (agent.parent != root_) helpers_.insert(agent.parent);
  Fields event{"request", number, std::to_string(connection.pid), std::to_string(agent.parent)};
  event.insert(event.end(), {as_field(parent.command), kind, directory, std::to_string(argv.size())});
  event.insert(event.end(), argv.begin(), argv.end());
  event.push_back(std::to_string(environment.size()));
  event.insert(event.end(), environment.begin(), environment.end());
  emit_(event);
}

const std::vector<Inherited>& AgentServer::descriptors(int connection) const {
  static const std::vector<Inherited> none;
  const int fd = find(connection);
  return fd < 0 ? none : connections_.at(fd).inherited;
}

void AgentServer::close_descriptors(int connection) {
  const int fd = find(connection);
  if (fd >= 0) close_all(connections_[fd].inherited);
}

// One small frame fits into the socket's buffer; an agent that does not take it sees the end of the connection.
void AgentServer::end(int connection, int code, const std::string& text) {
  const int fd = find(connection);
  if (fd < 0) return;
  std::string frame;
  append_frame(frame, {"end", std::to_string(code), as_field(text)});
  static_cast<void>(::send(fd, frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT));
  forget(fd);
}

void AgentServer::hang_up(int fd, const char* cause) {
  const Connection& connection = connections_.at(fd);
  const int number = connection.number;
  const pid_t pid = connection.pid;
  const bool asked = connection.asked;
  forget(fd);
  if (asked) {
    emit_({"hangup", std::to_string(number), cause});
  } else {
    emit_({"note", "an MPI agent (pid " + std::to_string(pid) + ") left without a request (" + cause + ")"});
  }
}

void AgentServer::forget(int fd) {
  const auto found = connections_.find(fd);
  close_all(found->second.inherited);
  connections_.erase(found);
  ::close(fd);
}

int AgentServer::find(int connection) const {
  for (const auto& [fd, one] : connections_) {
    if (one.number == connection) return fd;
  }
  return -1;
}

}  // namespace launcher::guardian
