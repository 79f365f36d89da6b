// Memory of the ranks that all of a group have mapped. A rank announces it to the others by a message that carries the
// descriptor; they take it in when they first need it, so nobody waits for anybody.
#ifndef LAUNCHER_COLLECTIVES_REGISTRY_H
#define LAUNCHER_COLLECTIVES_REGISTRY_H

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "member.h"
#include "system.h"

namespace launcher::collectives {

class Registry {
 public:
  // `in_process`: the other ranks are threads of this process and use the memory where it is.
  Registry(Member& member, Descriptor inbox, std::vector<Descriptor> outboxes, bool in_process);

  void* allocate(std::size_t bytes);
  void release(void* address);
  void add(void* address, std::size_t bytes, int descriptor);
  void remove(void* address);

  // The registration that holds all of the range; id 0: none.
  Region find(const void* address, std::size_t bytes) const noexcept;
  // Where `region` of `rank` is in this process. Reads the inbox until it is known.
  std::byte* at(int rank, const Region& region);
  // Takes in and sends what is waiting; cheap when nothing is.
  void serve();

 private:
  enum class Kind : std::uint32_t { add, remove };
  struct Notice {
    Kind kind = Kind::add;
    std::int32_t rank = 0;
    std::uint32_t id = 0;
    std::uint32_t unused = 0;
    std::uint64_t bytes = 0;
    std::uint64_t address = 0;
  };
  struct Own {
    std::uintptr_t address = 0;
    std::size_t bytes = 0;
    std::uint32_t id = 0;
    Descriptor memory;
    Mapping mapping;      // of what allocate() made
    int unannounced = 0;  // ranks that have not been told yet
  };
  struct Foreign {
    Mapping mapping;
    std::byte* address = nullptr;
  };
  struct Unsent {
    int rank;
    Notice notice;
  };

  void check_owner();  // throws in a fork
  void announce(const Notice& notice);
  bool send(int rank, const Notice& notice);
  bool receive();
  Own* own(std::uint32_t id) noexcept;
  void drop(std::vector<Own>::iterator entry);

  Member& member_;
  Descriptor inbox_;
  std::vector<Descriptor> outboxes_;
  bool in_process_;
  std::uint32_t last_id_ = 0;
  std::uint32_t received_ = 0;
  std::vector<Own> own_;
  std::vector<std::unordered_map<std::uint32_t, Foreign>> foreign_;  // by rank
  std::deque<Unsent> unsent_;
};

}  // namespace launcher::collectives

#endif
