// A libsvm file: what is taken has keys that grow, inside the matrix, and is what the file's facts say.
#include "libsvm.h"

#include <algorithm>

#include "../fuzz.h"

using namespace launcher;
using fuzz::require;

std::vector<std::string> fuzz::seeds() {
  return {"1 1:0.5 3:-2e3 # comment 9:9\r\n# 7:7\n\n-1 qid:4 2:.25\n 0\n", "3\t0:nan 12:7", "1 5:1 5:2\n2 3:1 1:1\n",
          "1 qid:1 999999999999999999:1\n0 qid:-2"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const fuzz::MemoryFile memory(bytes, size);
  const auto mapped = memory.open(data::Access::mapped), read = memory.open(data::Access::read);
  const data::FileIndex part = data::scan_libsvm(*mapped, true);
  const data::FileIndex other = data::scan_libsvm(*read, true);
  require(part.records() == other.records() && part.note() == other.note(), "a file is the same mapped and read");
  const data::LibsvmFacts facts = data::libsvm_facts(data::Index({mapped}, {part}));
  const bool zero_based = facts.any && facts.smallest == 0;
  const std::uint64_t base = zero_based ? 0 : 1;
  const data::LibsvmCodec codec(
      {.features = facts.any ? facts.largest + 1 - base : 0, .zero_based = zero_based, .queries = facts.queries});
  data::Batch batch(codec.fields(), 1);
  data::LibsvmCodec::State state;
  for (std::uint64_t i = 0; i < part.records(); ++i) {
    const auto [offset, length] = part.at(i);
    const std::vector<std::uint8_t> copy(bytes + offset, bytes + offset + length);  // a byte beyond it is a fault
    try {
      codec.decode(std::as_bytes(std::span(copy)), {0, offset, length, i}, *mapped, 0, batch, state);
    } catch (const data::DataError& error) {
      require(error.offset() >= offset && error.offset() <= offset + length, "an error is inside its record");
      continue;
    }
    const auto count = static_cast<std::size_t>(batch.columns[1].offsets[1]);
    const auto* keys = reinterpret_cast<const std::uint64_t*>(batch.columns[1].keys.data());
    require(std::adjacent_find(keys, keys + count, std::greater_equal<>()) == keys + count, "keys grow");
    require(count == 0 || (keys[0] + base >= facts.smallest && keys[count - 1] + base <= facts.largest), "the facts");
  }
  return 0;
}
