// Records of comma-separated values, as RFC 4180 and pandas read them.
#ifndef LAUNCHER_DATA_CSV_H
#define LAUNCHER_DATA_CSV_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index.h"
#include "source.h"

namespace launcher::data {

struct CsvRules {
  char delimiter = ',';
  char quote = '"';  // '\0': none
};

// Where a field of the batch comes from. Fixed: the numbers of `count` columns from `first` on, float32, float64, int32
// or int64; ragged: the text of column `first`, without quotes, as uint8.
struct CsvField {
  Field field;
  std::size_t first = 0, count = 1;
};

// The fields of one record, without their quotes. Throws std::invalid_argument: a quoted field without an end.
std::vector<std::string> csv_split(std::string_view line, const CsvRules& rules);

// The header that scan_lines() has found in the files, which is that of all. Throws DataError: mismatch, two files have
// different ones; malformed, there is none, since all files are empty.
std::string csv_header(const Index& index);

// A number may have blanks around it. Where a floating column has nothing, or one of pandas' words for a missing value
// (NA, NULL, ...), the number is NaN. Everything else that is no number, and another number of columns than the schema
// has, is a DataError: mismatch.
class CsvCodec {
 public:
  struct State {
    std::vector<std::uint32_t> bounds;  // column i is [bounds[i], bounds[i + 1] - 1) of the line
    std::string unquoted;
  };

  // Throws std::invalid_argument: a field that is not of these columns, or of no type that text can become.
  CsvCodec(const CsvRules& rules, std::size_t columns, std::vector<CsvField> fields);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  CsvRules rules_;
  std::size_t columns_;
  std::vector<CsvField> parts_;
  std::vector<Field> fields_;
};

std::shared_ptr<const Source> csv_source(Index index, CsvCodec codec);

}  // namespace launcher::data

#endif
