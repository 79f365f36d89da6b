// An MDS shard: both ways to read it must find the same samples, inside the file; a sample is read or refused.
#include <cstring>

#include "../fuzz.h"
#include "mds.h"

using namespace launcher;
using fuzz::require;

namespace {

std::string word(std::size_t value) {
  const auto number = static_cast<std::uint32_t>(value);
  std::string text(sizeof number, '\0');
  std::memcpy(text.data(), &number, sizeof number);
  return text;
}

std::string shard(const std::vector<std::string>& samples) {
  const std::string header = "{}";
  std::size_t at = 4 * (samples.size() + 2) + header.size();
  std::string table = word(samples.size()) + word(at), bodies;
  for (const std::string& sample : samples) {
    table += word(at += sample.size());
    bodies += sample;
  }
  return table + header + bodies;
}

std::string sample(const std::string& line, const std::string& text) {
  const std::string array = std::string("\x04") + static_cast<char>(line.size() / 4) + line;
  return word(array.size()) + word(text.size()) + "12345678" + array + text;
}

void check_records(const std::shared_ptr<const data::File>& file, const data::FileIndex& part) {
  const data::Index index({file}, {part});
  const auto source =
      data::mds_source(index, {{{"number", data::Kind::fixed, data::DType::int64, {}}, 8},
                               {{"line", data::Kind::ragged, data::DType::float32, {}}, 0, data::MdsCoding::shaped},
                               {{"text", data::Kind::ragged, data::DType::uint8, {}}}});
  const auto scratch = source->make_scratch();
  for (std::uint64_t record = 0; record < index.records(); ++record) {
    data::Batch batch(source->fields(), 1);
    try {
      source->fetch({&record, 1}, batch, *scratch);
      require(batch.rows == 1, "a sample is a row");
    } catch (const data::DataError& error) {
      require(error.record() == record && batch.rows == 0, "an error names the sample");
    }
  }
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  const std::string some = sample("abcdabcd", "text"), none = sample("", "");
  return {shard({}), shard({some, none}), shard({none, some, some, some})};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const fuzz::MemoryFile memory(bytes, size);
  const auto mapped = memory.open(data::Access::mapped), read = memory.open(data::Access::read);
  try {
    data::mds_header(*read);
  } catch (const data::DataError& error) {
    require(error.offset() <= size, "an error is inside the file");
  }
  for (const bool skip : {false, true}) {
    data::FileIndex index;
    try {
      index = data::scan_mds(*mapped, skip);
    } catch (const data::DataError& error) {
      require(error.offset() <= size, "an error is inside the file");
      continue;
    }
    const data::FileIndex other = data::scan_mds(*read, skip);
    require(index.records() == other.records() && (skip || index.damage().empty()), "a file is the same however read");
    for (std::uint64_t i = 0; i < index.records(); ++i) {
      const auto [offset, length] = index.at(i);
      require(length != 0 && offset <= size && length <= size - offset, "samples are inside the file");
    }
    check_records(mapped, index);
    check_records(read, other);
  }
  return 0;
}
