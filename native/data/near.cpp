#include "near.h"

namespace launcher::data {

void copy_long(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  constexpr std::size_t kChunk = 2048;  // for more the C library has other ways, which are no faster here
  while (bytes != 0) {
    const std::size_t now = std::min(bytes, kChunk);
    if (bytes > kNearBytes) {
      bring_near(from + kNearBytes, std::min(now, bytes - kNearBytes));
    }
    std::memcpy(to, from, now);
    to += now;
    from += now;
    bytes -= now;
  }
}

}  // namespace launcher::data
