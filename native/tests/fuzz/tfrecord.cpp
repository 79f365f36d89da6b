// A TFRecord file: both ways to read it must find the same records, inside the file.
#include <numeric>

#include "../fuzz.h"
#include "encode.h"
#include "indexed_source.h"
#include "tfrecord.h"

using namespace launcher;
using fuzz::require;

std::vector<std::string> fuzz::seeds() {
  std::string some, long_one;
  for (const std::string& record : {std::string("first"), std::string(), std::string(40, 'x'), std::string("last")}) {
    data::append_tfrecord(some, std::as_bytes(std::span(record)));
  }
  const std::string large(5000, 'y');
  data::append_tfrecord(long_one, std::as_bytes(std::span(large)));
  return {some, some + long_one, some + some};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const fuzz::MemoryFile memory(bytes, size);
  const auto mapped = memory.open(data::Access::mapped), read = memory.open(data::Access::read);
  const data::FileIndex skipped = data::scan_tfrecord(*mapped, true);
  require(skipped.records() == data::scan_tfrecord(*read, true).records(), "a file is the same mapped and read");
  std::uint64_t covered = 0;
  for (std::uint64_t i = 0; i < skipped.records(); ++i) {
    covered += skipped.at(i).second;
  }
  for (const data::Damage& damage : skipped.damage()) {
    covered += damage.bytes;
  }
  require(covered == size, "each byte is of a record or of damage");
  try {
    data::scan_tfrecord(*mapped, false);
    require(skipped.damage().empty(), "no error, so nothing to skip");
  } catch (const data::DataError& error) {
    require(!skipped.damage().empty() && error.offset() <= size, "an error is what would be skipped");
  }
  const data::Index index({mapped}, {skipped});
  for (const bool check_sums : {false, true}) {
    const data::IndexedSource<data::TfRecordCodec> source(index, data::TfRecordCodec(check_sums));
    data::Batch batch(source.fields(), static_cast<std::size_t>(index.records()));
    std::vector<std::uint64_t> all(static_cast<std::size_t>(index.records()));
    std::iota(all.begin(), all.end(), 0);
    auto scratch = source.make_scratch();
    try {
      source.fetch(all, batch, *scratch);
      require(batch.rows == all.size(), "all indexed records are read");
    } catch (const data::DataError& error) {
      require(check_sums && error.record() == batch.rows, "only a sum can be wrong");
    }
  }
  return 0;
}
