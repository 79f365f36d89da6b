#include "checking.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <span>

namespace launcher::data {

Checked check_records(const Source& source, std::uint64_t begin, std::uint64_t end, std::size_t most) {
  constexpr std::uint64_t kLargest = 256;                    // records at a time
  constexpr std::uint64_t kBytes = std::uint64_t{16} << 20;  // about as much of them
  const std::uint64_t mean = std::max<std::uint64_t>(source.bytes() / std::max<std::uint64_t>(source.records(), 1), 1);
  const auto rows = static_cast<std::size_t>(std::clamp<std::uint64_t>(kBytes / mean, 1, kLargest));
  Batch batch(source.fields(), rows);
  const std::unique_ptr<Scratch> scratch = source.make_scratch();
  std::vector<std::uint64_t> records(rows);
  Checked result;
  while (begin < end) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(rows, end - begin));
    std::iota(records.begin(), records.end(), begin);
    batch.rows = 0;
    try {
      source.fetch({records.data(), count}, batch, *scratch);
      begin += count;
    } catch (const DataError& error) {
      ++result.bad;
      if (result.errors.size() < most) {
        result.errors.push_back(error);
      }
      begin += batch.rows + 1;
    }
  }
  return result;
}

}  // namespace launcher::data
