#include "extents.h"

#include <algorithm>
#include <cstring>

namespace launcher::data {

void Extents::reserve(std::uint64_t bytes) noexcept {
  std::uint64_t now = limit_.load();
  while (now < bytes && !limit_.compare_exchange_weak(now, bytes)) {
  }
}

std::size_t Extents::Hash::operator()(const Key& key) const noexcept {
  constexpr std::uint64_t kFactor = 0x9E3779B97F4A7C15;
  return static_cast<std::size_t>((key.file * kFactor + key.number) * kFactor >> 16);
}

std::shared_ptr<Extents::Extent> Extents::find(const Key& key) {
  const std::lock_guard lock(mutex_);
  if (const auto found = places_.find(key); found != places_.end()) {
    order_.splice(order_.begin(), order_, found->second);
    return order_.front();
  }
  order_.push_front(std::make_shared<Extent>(key));
  try {
    places_.emplace(key, order_.begin());
  } catch (...) {
    order_.pop_front();
    throw;
  }
  const std::uint64_t most = std::max<std::uint64_t>(limit_.load() / kExtentBytes, 2);
  while (order_.size() > most) {
    places_.erase(order_.back()->key);
    order_.pop_back();  // whoever copies from it holds it
  }
  return order_.front();
}

void Extents::copy(std::uint64_t file, std::uint64_t size, std::uint64_t offset, std::span<std::byte> memory,
                   const Read& read) {
  while (!memory.empty()) {
    const std::uint64_t number = offset / kExtentBytes;
    const std::uint64_t begin = number * kExtentBytes;
    const std::shared_ptr<Extent> extent = find({file, number});
    {
      const std::lock_guard lock(extent->mutex);
      if (!extent->read) {
        extent->bytes = static_cast<std::size_t>(std::min<std::uint64_t>(kExtentBytes, size - begin));
        extent->memory.reserve(extent->bytes, 0);
        read(begin, {extent->memory.data(), extent->bytes});
        extent->read = true;
      }
    }
    const auto within = static_cast<std::size_t>(offset - begin);
    const std::size_t count = std::min(memory.size(), extent->bytes - within);
    std::memcpy(memory.data(), extent->memory.data() + within, count);
    memory = memory.subspan(count);
    offset += count;
  }
}

void Extents::drop(std::uint64_t file) noexcept {
  const std::lock_guard lock(mutex_);
  for (auto place = order_.begin(); place != order_.end();) {
    if ((*place)->key.file == file) {
      places_.erase((*place)->key);
      place = order_.erase(place);
    } else {
      ++place;
    }
  }
}

Extents& extents() {
  static Extents& all = *new Extents;  // files may go after it would
  return all;
}

}  // namespace launcher::data
