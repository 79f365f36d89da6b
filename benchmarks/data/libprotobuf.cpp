// RecordIO-protobuf through libprotobuf: one message that is used again for each record, its values copied to the
// batch. What a C++ reader of this format does that does not parse by itself.
#include <cstdint>
#include <cstring>

#include "record.pb.h"

namespace {

constexpr std::uint32_t kMagic = 0xCED7230A;
constexpr std::uint32_t kLength = (1U << 29) - 1;
aialgs::data::Record record;
const std::string key = "values";

bool take(const google::protobuf::Map<std::string, aialgs::data::Value>& map, int count, float* to) {
  const auto found = map.find(key);
  if (found == map.end() || !found->second.has_float32_tensor()) return false;
  const auto& values = found->second.float32_tensor().values();
  if (values.size() != count) return false;
  std::memcpy(to, values.data(), sizeof(float) * static_cast<std::size_t>(count));
  return true;
}

}  // namespace

extern "C" {

// `rows` records from `data` on; where the next one begins, or -1. Each has `width` values and one label.
std::int64_t parse(const unsigned char* data, std::int64_t bytes, std::int64_t at, int rows, int width, float* values,
                   float* labels) {
  for (int row = 0; row < rows; ++row) {
    std::uint32_t head[2];
    if (bytes - at < static_cast<std::int64_t>(sizeof head)) return -1;
    std::memcpy(head, data + at, sizeof head);
    const std::int64_t length = head[1] & kLength;
    at += static_cast<std::int64_t>(sizeof head);
    if (head[0] != kMagic || head[1] >> 29 != 0 || bytes - at < length) return -1;
    if (!record.ParseFromArray(data + at, static_cast<int>(length))) return -1;
    if (!take(record.features(), width, values + static_cast<std::int64_t>(row) * width)) return -1;
    if (!take(record.label(), 1, labels + row)) return -1;
    at += (length + 3) / 4 * 4;
  }
  return at;
}
}
