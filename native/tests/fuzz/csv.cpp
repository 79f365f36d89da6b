// A CSV file: mapped, read and in pieces it has the same records, and each column is what csv_split() and
// parse_number() make of it. The first byte says what the delimiter and the quote are.
#include "csv.h"

#include <cmath>
#include <numeric>

#include "../fuzz.h"
#include "lines.h"
#include "numbers.h"
#include "text.h"

using namespace launcher;
using fuzz::require;

namespace {

// At memory of its own, so that a byte beyond it is a fault.
template <typename Codec>
void decode(const Codec& codec, std::string_view record, const data::File& file, data::Batch& batch,
            typename Codec::State& state) {
  const std::vector<char> copy(record.begin(), record.end());
  codec.decode(std::as_bytes(std::span(copy)), {0, 0, record.size(), 0}, file, 0, batch, state);
}

void check_numbers(const data::CsvRules& rules, std::string_view record, std::size_t columns, const data::File& file) {
  const data::CsvCodec codec(rules, columns, {{{"a", data::Kind::fixed, data::DType::float32, {columns}}, 0, columns}});
  data::Batch batch(codec.fields(), 1);
  data::CsvCodec::State state;
  bool taken = true;
  try {
    decode(codec, record, file, batch, state);
  } catch (const data::DataError&) {
    taken = false;
  }
  const auto texts = data::csv_split(data::without_line_end(record), rules);
  for (std::size_t i = 0; taken && i < columns; ++i) {
    const float found = batch.columns[0].fixed_row<float>(0, columns)[i];
    const auto wanted = data::parse_number<float>(data::trimmed(texts[i]));
    require(wanted ? found == *wanted || (std::isnan(found) && std::isnan(*wanted)) : std::isnan(found), "a number");
  }
}

void check_record(const data::CsvRules& rules, std::string_view record, std::size_t columns, const data::File& file) {
  std::vector<data::CsvField> fields;
  for (std::size_t i = 0; i < columns; ++i) {
    fields.push_back({{std::to_string(i), data::Kind::ragged, data::DType::uint8, {}}, i, 1});
  }
  const data::CsvCodec codec(rules, columns, fields);
  data::Batch batch(codec.fields(), 1);
  data::CsvCodec::State state;
  const auto texts = data::csv_split(data::without_line_end(record), rules);
  try {
    decode(codec, record, file, batch, state);
  } catch (const data::DataError& error) {
    require(error.problem() == data::Problem::mismatch && texts.size() != columns, "a record has its columns");
    return;
  }
  require(texts.size() == columns, "as many columns");
  for (std::size_t i = 0; i < columns; ++i) {
    const auto* text = reinterpret_cast<const char*>(batch.columns[i].values.data());
    require(texts[i] == std::string_view(text, static_cast<std::size_t>(batch.columns[i].offsets[1])), "a column");
  }
  check_numbers(rules, record, columns, file);
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  return {std::string("\0", 1) + "1,2.5,-3e5\n4,5,6\r\n\n7,8,9", "\1a,\"b,\"\"c\"\"\n\",1\n\"\",,nan\n",
          "\2"
          "1;2\n3;\"4\n",
          std::string("\0", 1) + "0.123456,-12345678.12345678,123456789012345678901234567890\n1,2,3\n"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size == 0 || size > 4096) {
    return 0;
  }
  constexpr data::CsvRules kRules[] = {{}, {',', '"'}, {';', '\0'}, {'\t', '\''}};
  const data::CsvRules rules = kRules[bytes[0] % 4];
  const fuzz::MemoryFile memory(bytes + 1, size - 1);
  const auto mapped = memory.open(data::Access::mapped), read = memory.open(data::Access::read);
  const data::LineScan scan{.rules = {.quote = rules.quote, .delimiter = rules.delimiter}, .skip = true};
  const data::FileIndex index = data::scan_lines(*mapped, scan);
  require(index.records() == data::scan_lines(*read, scan).records(), "a file is the same mapped and read");
  const std::string_view content(reinterpret_cast<const char*>(bytes + 1), size - 1);
  const std::uint64_t mark = content.starts_with("\xEF\xBB\xBF") ? 3 : 0;
  data::LineFramer framer(scan.rules);
  std::uint64_t found = 0;
  const auto check = [&](std::uint64_t begin, std::uint64_t end) {
    require(found < index.records() && index.at(found) == std::pair(begin + mark, end - begin), "the same in pieces");
    ++found;
  };
  const std::size_t piece = 1 + bytes[0] / 4;
  for (std::uint64_t at = mark; at < content.size(); at += piece) {
    framer.feed(content.substr(at, piece), check);
  }
  require(framer.finish(check) == index.damage().empty() && found == index.records(), "as many in pieces");
  std::size_t columns = 0;
  for (std::uint64_t i = 0; i < index.records(); ++i) {
    const auto [offset, length] = index.at(i);
    const std::string_view record = content.substr(offset, length);
    columns = columns == 0 ? data::csv_split(data::without_line_end(record), rules).size() : columns;
    check_record(rules, record, columns, *mapped);
  }
  return 0;
}
