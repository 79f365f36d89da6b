#include "csv.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "indexed_source.h"
#include "lines.h"
#include "numbers.h"
#include "text.h"

namespace launcher::data {
namespace {

constexpr const char* kNoClosingQuote = "a quoted field has no closing quote";

// The words that pandas' read_csv() takes for a missing value (its na_values), less those that are numbers to us.
bool is_missing(std::string_view text) noexcept {
  constexpr std::string_view words[] = {"",     "#N/A", "#N/A N/A", "#NA",  "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN",
                                        "<NA>", "N/A",  "NA",       "NULL", "None",    "n/a",      "null"};
  return std::find(std::begin(words), std::end(words), text) != std::end(words);
}

// The next column of `line`, which begins at `at`, is added to `out` without its quotes: where it ends. npos: it has a
// quote that is not closed.
std::size_t unquote(std::string_view line, std::size_t at, const CsvRules& rules, std::string& out) {
  if (at < line.size() && line[at] == rules.quote && rules.quote != '\0') {
    ++at;
    while (true) {
      const std::size_t quote = line.find(rules.quote, at);
      if (quote == std::string_view::npos) {
        return std::string_view::npos;
      }
      out += line.substr(at, quote - at);
      at = quote + 1;
      if (at == line.size() || line[at] != rules.quote) {
        break;
      }
      out += rules.quote;
      ++at;
    }
  }
  const std::size_t end = std::min(line.find(rules.delimiter, at), line.size());
  out += line.substr(at, end - at);
  return end;
}

// One record's line, split into its columns.
struct Split {
  const char* text;
  std::size_t size;
  std::size_t columns;
  bool moved = false;  // the text is not as in the file: quotes were left out
};

// Columns beyond `most` are only counted. `columns` is 0 for a quote that is not closed.
Split split_quoted(std::string_view line, std::size_t most, const CsvRules& rules, CsvCodec::State& state) {
  state.unquoted.clear();
  state.unquoted.reserve(line.size() + 1);
  std::size_t count = 0;
  for (std::size_t at = 0;; ++at) {
    at = unquote(line, at, rules, state.unquoted);
    if (at == std::string_view::npos) {
      return {nullptr, 0, 0, true};
    }
    state.unquoted += rules.delimiter;  // one byte between columns, as in a line without quotes
    if (++count <= most) {
      state.bounds[count] = static_cast<std::uint32_t>(state.unquoted.size());
    }
    if (at == line.size()) {
      return {state.unquoted.data(), state.unquoted.size() - 1, count, true};
    }
  }
}

Split split(std::string_view line, std::size_t most, const CsvRules& rules, CsvCodec::State& state) {
  if (state.bounds.size() < most + 2) {
    state.bounds.resize(most + 2);
  }
  std::uint32_t* const bounds = state.bounds.data();
  const char quote = rules.quote == '\0' ? rules.delimiter : rules.quote;
  bounds[0] = 0;
  std::size_t count = 0;
  for (std::size_t at = 0; at < line.size(); at += kTextBlock) {
    const char* block = line.data() + at;
    char padded[kTextBlock];
    std::uint64_t present = ~std::uint64_t{0};
    if (line.size() - at < kTextBlock) {
      std::memcpy(padded, block, line.size() - at);
      std::memset(padded + (line.size() - at), 0, kTextBlock - (line.size() - at));
      block = padded;
      present = (std::uint64_t{1} << (line.size() - at)) - 1;
    }
    std::uint64_t marks = marks_of(block, rules.delimiter, quote) & present;
    for (; marks != 0; marks &= marks - 1) {
      const auto place = static_cast<std::size_t>(std::countr_zero(marks));
      if (block[place] != rules.delimiter) {
        return split_quoted(line, most, rules, state);
      }
      bounds[std::min(++count, most + 1)] = static_cast<std::uint32_t>(at + place + 1);
    }
  }
  bounds[std::min(++count, most + 1)] = static_cast<std::uint32_t>(line.size() + 1);
  return {line.data(), line.size(), count};
}

template <typename T>
bool exact_number(std::string_view text, T& out) noexcept {
  text = trimmed(text);
  if (const auto number = parse_number<T>(text)) {
    out = *number;
    return true;
  }
  if constexpr (std::is_floating_point_v<T>) {
    if (is_missing(text)) {
      out = std::numeric_limits<T>::quiet_NaN();
      return true;
    }
  }
  return false;
}

// The numbers of columns first .. count - 1 (the column 0 begins at bounds[0]), up to one that is in no usual form:
// that column, or `count`.
template <typename T>
std::size_t usual_numbers(const QuickText& quick, const std::uint32_t* bounds, std::size_t first, std::size_t count,
                          T* out) {
  std::size_t i = first;
  for (T number; i < count && quick_number(quick.at(bounds[i]), bounds[i + 1] - bounds[i] - 1, number); ++i) {
    std::memcpy(out + i, &number, sizeof(T));
  }
  return i;
}

#ifdef __x86_64__
template <typename T>
[[gnu::target("sse4.1")]] std::size_t wide_numbers(const QuickText& quick, const std::uint32_t* bounds,
                                                   std::size_t first, std::size_t count, T* out) {
  std::size_t i = first;
  for (T number; i < count && wide_number(quick.at(bounds[i]), bounds[i + 1] - bounds[i] - 1, number); ++i) {
    std::memcpy(out + i, &number, sizeof(T));
  }
  return i;
}
#endif

// All of them, in whatever form. The column that is none, or `count`.
template <typename T>
std::size_t numbers(const char* line, const QuickText& quick, const std::uint32_t* bounds, std::size_t count, T* out) {
  auto* most = usual_numbers<T>;
#ifdef __x86_64__
  if constexpr (std::is_floating_point_v<T>) {
    static const bool wide = __builtin_cpu_supports("sse4.1") != 0;
    most = wide ? wide_numbers<T> : most;
  }
#endif
  for (std::size_t i = 0;; ++i) {
    i = most(quick, bounds, i, count, out);
    if (i == count) {
      return count;
    }
    T number;
    if (!exact_number({line + bounds[i], bounds[i + 1] - bounds[i] - 1}, number)) {
      return i;
    }
    std::memcpy(out + i, &number, sizeof(T));
  }
}

}  // namespace

std::vector<std::string> csv_split(std::string_view line, const CsvRules& rules) {
  std::vector<std::string> columns;
  for (std::size_t at = 0;; ++at) {
    at = unquote(line, at, rules, columns.emplace_back());
    if (at == std::string_view::npos) {
      throw std::invalid_argument(kNoClosingQuote);
    }
    if (at == line.size()) {
      return columns;
    }
  }
}

std::string csv_header(const Index& index) {
  const File* first = nullptr;
  std::string header;
  for (std::size_t i = 0; i < index.files().size(); ++i) {
    const File& file = *index.files()[i];
    const std::string& note = index.part(i).note();
    if (file.size() == 0) {
      continue;
    }
    if (first == nullptr) {
      first = &file;
      header = note;
    } else if (note != header) {
      throw DataError(Problem::mismatch, file.path(), 0, kNowhere,
                      "the header is " + shown(note) + "; expected " + shown(header) + " as in " + first->path());
    }
  }
  if (first == nullptr) {
    throw DataError(Problem::malformed, "", kNowhere, kNowhere, "there is no header: the files are empty");
  }
  return header;
}

CsvCodec::CsvCodec(const CsvRules& rules, std::size_t columns, std::vector<CsvField> fields)
    : rules_(rules), columns_(columns), parts_(std::move(fields)) {
  for (const CsvField& part : parts_) {
    const bool text = part.field.kind == Kind::ragged && part.field.dtype == DType::uint8 && part.count == 1;
    const bool number =
        part.field.kind == Kind::fixed && is_text_number(part.field.dtype) && part.field.values() == part.count;
    if (!(text || number) || part.count > columns || part.first > columns - part.count) {
      throw std::invalid_argument("field " + shown(part.field.name) + " is columns " + std::to_string(part.first) +
                                  " to " + std::to_string(part.first + part.count) + " as " +
                                  name_of(part.field.dtype) + "; expected columns below " + std::to_string(columns) +
                                  ", and float32, float64, int32, int64, or the text of one column");
    }
    fields_.push_back(part.field);
  }
}

void CsvCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                      Batch& batch, State& state) const {
  const auto fail = [&](Problem problem, std::uint64_t offset, const std::string& text) {
    throw DataError(problem, file.path(), offset, place.number, text + line_number(file, offset));
  };
  const std::string_view whole = without_line_end(record);
  if (whole.size() >= std::numeric_limits<std::uint32_t>::max()) {
    fail(Problem::malformed, place.offset, "a record of 4 GiB or more; a quote that is not closed could make one");
  }
  const Split line = split(whole, columns_, rules_, state);
  if (line.columns == 0) {
    fail(Problem::malformed, place.offset, kNoClosingQuote);
  }
  if (line.columns != columns_) {
    fail(Problem::mismatch, place.offset,
         "a row of " + std::to_string(line.columns) + " columns; expected " + std::to_string(columns_) +
             " as in the first row");
  }
  const QuickText quick({line.text, line.size});
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const CsvField& part = parts_[i];
    Column& column = batch.columns[i];
    const std::uint32_t* bounds = state.bounds.data() + part.first;
    std::size_t done = part.count;
    if (part.field.kind == Kind::ragged) {
      const std::size_t bytes = bounds[1] - bounds[0] - 1;
      if (bytes != 0) {
        std::memcpy(append(column, row, bytes, 1), line.text + bounds[0], bytes);
      }
      column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(bytes);
    } else if (part.field.dtype == DType::float32) {
      done = numbers(line.text, quick, bounds, part.count, column.fixed_row<float>(row, part.count));
    } else if (part.field.dtype == DType::float64) {
      done = numbers(line.text, quick, bounds, part.count, column.fixed_row<double>(row, part.count));
    } else if (part.field.dtype == DType::int64) {
      done = numbers(line.text, quick, bounds, part.count, column.fixed_row<std::int64_t>(row, part.count));
    } else {
      done = numbers(line.text, quick, bounds, part.count, column.fixed_row<std::int32_t>(row, part.count));
    }
    if (done != part.count) {
      const std::string_view found(line.text + bounds[done], bounds[done + 1] - bounds[done] - 1);
      fail(Problem::mismatch, place.offset + (line.moved ? 0 : bounds[done]),
           "column " + std::to_string(part.first + done) + " (counted from 0) is " + shown(found) + "; expected " +
               (is_floating(part.field.dtype) ? "a number" : "a whole number that fits ") +
               (is_floating(part.field.dtype) ? "" : name_of(part.field.dtype)));
    }
  }
}

std::shared_ptr<const Source> csv_source(Index index, CsvCodec codec) {
  return std::make_shared<IndexedSource<CsvCodec>>(std::move(index), std::move(codec));
}

}  // namespace launcher::data
