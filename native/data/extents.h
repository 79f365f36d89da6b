// What was read of files that are not mapped, in pieces that suit what FUSE serves.
#ifndef LAUNCHER_DATA_EXTENTS_H
#define LAUNCHER_DATA_EXTENTS_H

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>

#include "batch.h"

namespace launcher::data {

// The least that is asked of such a file at a time (but for its end). FUSE's own largest request is as much.
inline constexpr std::size_t kExtentBytes = std::size_t{1} << 20;

// Aligned pieces of files, those read last: with an order of blocks, whose window it can hold, each byte of a file is
// read about once. One for the process; any number of threads.
class Extents {
 public:
  using Read = std::function<void(std::uint64_t offset, std::span<std::byte> memory)>;

  // How much is kept. What the orders in use need is set, not guessed: the greatest of what was asked for.
  void reserve(std::uint64_t bytes) noexcept;
  // Copies `memory.size()` bytes of file `file`, which has `size`, from `offset` on. What is not there is read by
  // `read`, once also where several threads want it; what that throws comes through.
  void copy(std::uint64_t file, std::uint64_t size, std::uint64_t offset, std::span<std::byte> memory,
            const Read& read);
  // The file is gone.
  void drop(std::uint64_t file) noexcept;

 private:
  struct Key {
    std::uint64_t file, number;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Key& key) const noexcept;
  };
  struct Extent {
    explicit Extent(const Key& its) : key(its) {}
    const Key key;
    std::mutex mutex;  // for reading it
    bool read = false;
    std::size_t bytes = 0;
    Buffer memory;
  };
  using Order = std::list<std::shared_ptr<Extent>>;

  std::shared_ptr<Extent> find(const Key& key);

  std::mutex mutex_;
  Order order_;  // used last, first
  std::unordered_map<Key, Order::iterator, Hash> places_;
  std::atomic<std::uint64_t> limit_{std::uint64_t{64} << 20};
};

Extents& extents();

}  // namespace launcher::data

#endif
