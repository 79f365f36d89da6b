#include "registry.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "message.h"

namespace launcher::collectives {

Registry::Registry(Member& member, Descriptor inbox, std::vector<Descriptor> outboxes, bool in_process)
    : member_(member),
      inbox_(std::move(inbox)),
      outboxes_(std::move(outboxes)),
      in_process_(in_process),
      foreign_(static_cast<std::size_t>(member.size())) {}

void Registry::check_owner() {
  if (member_.forked()) {
    member_.check_usable();
  }
}

void* Registry::allocate(std::size_t bytes) {
  check_owner();
  bytes = checked_bytes(std::max<std::size_t>(bytes, 1), 1);
  Own entry;
  entry.memory = make_memory("launcher-buffer", bytes);
  entry.mapping = Mapping(entry.memory, bytes);
  void* address = entry.mapping.address();
  entry.address = reinterpret_cast<std::uintptr_t>(address);
  entry.bytes = bytes;
  entry.id = ++last_id_;
  entry.unannounced = member_.size() - 1;
  const Notice notice{Kind::add, member_.rank(), entry.id, 0, bytes, entry.address};
  own_.push_back(std::move(entry));
  announce(notice);
  return address;
}

void Registry::add(void* address, std::size_t bytes, int descriptor) {
  check_owner();
  if (address == nullptr || bytes == 0) {
    throw std::invalid_argument("memory to register is empty");
  }
  std::uintptr_t end = 0;
  if (__builtin_add_overflow(reinterpret_cast<std::uintptr_t>(address), checked_bytes(bytes, 1), &end)) {
    throw std::invalid_argument("memory to register ends beyond the last address");
  }
  Own entry;
  entry.address = reinterpret_cast<std::uintptr_t>(address);
  for (const Own& other : own_) {
    if (entry.address < other.address + other.bytes && other.address < end) {
      throw std::invalid_argument("memory is registered already, wholly or in part");
    }
  }
  entry.memory = Descriptor(::fcntl(descriptor, F_DUPFD_CLOEXEC, 0));
  if (!entry.memory) {
    throw_system("dup of the descriptor of memory to register");
  }
  struct stat info;
  if (::fstat(entry.memory.get(), &info) != 0) {
    throw_system("fstat of memory to register");
  }
  if (static_cast<std::size_t>(info.st_size) < bytes) {  // the others could not map it
    throw std::invalid_argument("memory to register: " + std::to_string(bytes) + " bytes, but its descriptor has " +
                                std::to_string(info.st_size));
  }
  entry.bytes = bytes;
  entry.id = ++last_id_;
  entry.unannounced = member_.size() - 1;
  const Notice notice{Kind::add, member_.rank(), entry.id, 0, bytes, entry.address};
  own_.push_back(std::move(entry));
  announce(notice);
}

void Registry::release(void* address) {
  const auto found = std::find_if(own_.begin(), own_.end(), [&](const Own& entry) {
    return entry.mapping.address() != nullptr && entry.mapping.address() == address;
  });
  if (found == own_.end()) {
    throw std::invalid_argument("memory to release was not allocated by this group");
  }
  drop(found);
}

void Registry::remove(void* address) {
  const auto found = std::find_if(own_.begin(), own_.end(), [&](const Own& entry) {
    return entry.mapping.address() == nullptr && entry.address == reinterpret_cast<std::uintptr_t>(address);
  });
  if (found == own_.end()) {
    throw std::invalid_argument("memory to unregister was not registered with this group");
  }
  drop(found);
}

void Registry::drop(std::vector<Own>::iterator entry) {
  const std::uint32_t id = entry->id;
  own_.erase(entry);
  std::erase_if(unsent_,
                [&](const Unsent& waiting) { return waiting.notice.kind == Kind::add && waiting.notice.id == id; });
  announce({Kind::remove, member_.rank(), id, 0, 0, 0});
}

Registry::Own* Registry::own(std::uint32_t id) noexcept {
  const auto found = std::find_if(own_.begin(), own_.end(), [&](const Own& entry) { return entry.id == id; });
  return found == own_.end() ? nullptr : &*found;
}

void Registry::announce(const Notice& notice) {
  if (member_.forked()) {
    return;  // a fork gives back its own mapping only
  }
  for (int rank = 0; rank < member_.size(); ++rank) {
    if (rank == member_.rank()) {
      continue;
    }
    // In order: what is waiting goes first.
    const bool queued = std::any_of(unsent_.begin(), unsent_.end(), [&](const Unsent& u) { return u.rank == rank; });
    if (queued || !send(rank, notice)) {
      unsent_.push_back({rank, notice});
    }
  }
}

bool Registry::send(int rank, const Notice& notice) {
  Own* entry = notice.kind == Kind::add ? own(notice.id) : nullptr;
  iovec body{const_cast<Notice*>(&notice), sizeof notice};
  msghdr message{};
  message.msg_iov = &body;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  if (entry != nullptr) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int fd = entry->memory.get();
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  const ssize_t sent =
      ::sendmsg(outboxes_[static_cast<std::size_t>(rank)].get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent < 0 && (errno == EAGAIN || errno == ETOOMANYREFS || errno == ENOBUFS || errno == ENOMEM || errno == EINTR)) {
    return false;  // later: the rank has not read for a while
  }
  if (entry != nullptr) {
    --entry->unannounced;  // also when nobody is there any more
  }
  member_.segment().place(rank).messages.fetch_add(1, std::memory_order_release);
  return true;
}

void Registry::serve() {
  while (!unsent_.empty() && send(unsent_.front().rank, unsent_.front().notice)) {
    unsent_.pop_front();
  }
  const auto& messages = member_.segment().place(member_.rank()).messages;
  while (static_cast<std::int32_t>(messages.load(std::memory_order_acquire) - received_) > 0 && receive()) {
  }
}

bool Registry::receive() {
  Notice notice;
  iovec body{&notice, sizeof notice};
  msghdr message{};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  message.msg_iov = &body;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t count = ::recvmsg(inbox_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (count < 0) {
    return false;
  }
  Descriptor memory;
  if (const cmsghdr* header = CMSG_FIRSTHDR(&message);
      header != nullptr && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int))) {
    int fd;
    std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
    memory = Descriptor(fd);
  }
  ++received_;
  if (count != static_cast<ssize_t>(sizeof notice) || notice.rank < 0 || notice.rank >= member_.size()) {
    return true;
  }
  auto& theirs = foreign_[static_cast<std::size_t>(notice.rank)];
  if (notice.kind == Kind::remove) {
    theirs.erase(notice.id);
  } else if (in_process_) {
    theirs[notice.id].address = reinterpret_cast<std::byte*>(notice.address);
  } else {
    if (!memory) {
      throw std::system_error(EMFILE, std::generic_category(),
                              "no descriptor for memory of " + place_of(member_.options(), notice.rank) +
                                  ": raise the limit of open files (ulimit -n)");
    }
    Foreign& entry = theirs[notice.id];
    entry.mapping = Mapping(memory, notice.bytes);
    entry.address = entry.mapping.address();
  }
  return true;
}

Region Registry::find(const void* address, std::size_t bytes) const noexcept {
  const auto from = reinterpret_cast<std::uintptr_t>(address);
  for (const Own& entry : own_) {
    if (entry.unannounced == 0 && from >= entry.address && from - entry.address <= entry.bytes &&
        bytes <= entry.bytes - (from - entry.address)) {
      return {entry.id, from - entry.address};
    }
  }
  return {};
}

std::byte* Registry::at(int rank, const Region& region) {
  if (rank == member_.rank()) {
    const Own* entry = own(region.id);
    return reinterpret_cast<std::byte*>(entry->address) + region.offset;
  }
  auto& theirs = foreign_[static_cast<std::size_t>(rank)];
  for (;;) {
    if (const auto found = theirs.find(region.id); found != theirs.end()) {
      return found->second.address + region.offset;
    }
    if (!receive()) {  // it was sent before the rank said that it uses it
      member_.fail(Failure::system, rank,
                   place_of(member_.options(), rank) + " uses memory that was not announced (registration " +
                       std::to_string(region.id) + ")");
    }
  }
}

}  // namespace launcher::collectives
