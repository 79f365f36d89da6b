// A file of RecordIO frames: both ways to read it must find the same records, inside the file, and give their bytes.
#include <numeric>

#include "../fuzz.h"
#include "encode.h"
#include "indexed_source.h"
#include "recordio_codec.h"

using namespace launcher;
using fuzz::require;

namespace {

std::uint64_t check_order(const data::FileIndex& index, std::uint64_t size) {
  std::uint64_t covered = 0, end = 0;
  for (std::uint64_t i = 0; i < index.records(); ++i) {
    const auto [offset, bytes] = index.at(i);
    require(offset >= end && bytes >= data::kFrameHeaderBytes && bytes <= size - offset, "records follow each other");
    end = offset + bytes;
    covered += bytes;
  }
  for (const data::Damage& damage : index.damage()) {
    require(damage.offset <= size && damage.bytes <= size - damage.offset, "damage is inside the file");
    covered += damage.bytes;
  }
  return covered;
}

void read_all(const std::shared_ptr<const data::File>& file, const data::FileIndex& part, data::Dialect dialect) {
  const data::Index index({file}, {part});
  const data::IndexedSource<data::RecordCodec> source(index, data::RecordCodec(data::Dialects(dialect, 1)));
  data::Batch batch(source.fields(), static_cast<std::size_t>(index.records()));
  std::vector<std::uint64_t> all(static_cast<std::size_t>(index.records()));
  std::iota(all.begin(), all.end(), 0);
  auto scratch = source.make_scratch();
  source.fetch(all, batch, *scratch);
  require(batch.rows == all.size(), "all indexed records are read");
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  std::string magic = "\x0a\x23\xd7\xce", whole, escaped, plain;
  for (const std::string& payload :
       {std::string("first"), std::string(), magic + "1234" + magic, std::string(300, 'x')}) {
    data::append_recordio(whole, std::as_bytes(std::span(payload)), false);
    data::append_recordio(escaped, std::as_bytes(std::span(payload)), true);
  }
  for (const std::string& part : {std::string("\1\0\0\x20"
                                              "a\0\0\0",
                                              8),
                                  std::string("\3\0\0\x60"
                                              "bcd\0",
                                              8)}) {
    plain += magic + part;
  }
  return {whole, escaped, plain + whole, escaped + plain + escaped};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const fuzz::MemoryFile memory(bytes, size);
  const auto mapped = memory.open(data::Access::mapped), read = memory.open(data::Access::read);
  const data::FileIndex skipped = data::scan_recordio(*mapped, data::Dialect::automatic, true);
  const data::FileIndex other = data::scan_recordio(*read, data::Dialect::automatic, true);
  require(skipped.records() == other.records(), "a file is the same mapped and read");
  require(check_order(skipped, size) == size, "each byte is of a record or of damage");
  read_all(mapped, skipped, data::Dialect::automatic);
  read_all(read, other, data::Dialect::plain);
  try {
    const data::FileIndex strict = data::scan_recordio(*mapped, data::Dialect::automatic, false);
    require(strict.records() == skipped.records() && skipped.damage().empty(), "no error, so nothing to skip");
  } catch (const data::DataError& error) {
    require(!skipped.damage().empty() && error.offset() <= size, "an error is what would be skipped");
  }
  const data::Frames frames = data::read_frames(std::as_bytes(std::span(bytes, size)), false);
  require(!frames.whole() || frames.bytes <= size, "a record of a stream is inside what is there");
  return 0;
}
