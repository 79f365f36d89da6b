#include "libsvm.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "indexed_source.h"
#include "lines.h"
#include "numbers.h"
#include "text.h"

namespace launcher::data {
namespace {

constexpr std::string_view kQuery = "qid:";

bool is_blank(char c) noexcept { return c == ' ' || c == '\t' || c == '\r'; }

// The words of a line, up to a comment.
class Words {
 public:
  explicit Words(std::string_view line) noexcept : line_(line.substr(0, line.find('#'))) {}

  // False at the end of the line.
  bool next() noexcept {
    at_ = end_;
    while (at_ < line_.size() && is_blank(line_[at_])) {
      ++at_;
    }
    end_ = at_;
    while (end_ < line_.size() && !is_blank(line_[end_])) {
      ++end_;
    }
    return at_ != end_;
  }
  std::string_view word() const noexcept { return line_.substr(at_, end_ - at_); }
  std::size_t at() const noexcept { return at_; }
  std::string_view line() const noexcept { return line_; }

 private:
  std::string_view line_;
  std::size_t at_ = 0, end_ = 0;
};

struct Pair {
  std::uint64_t index;
  std::size_t value;  // where it begins in the word
};

std::optional<Pair> to_pair(std::string_view word) noexcept {
  constexpr std::size_t kDigits = 18;  // so many can not overflow
  std::uint64_t index = 0;
  std::size_t at = 0;
  while (at < word.size() && word[at] >= '0' && word[at] <= '9' && at < kDigits) {
    index = index * 10 + static_cast<std::uint64_t>(word[at++] - '0');
  }
  if (at == 0 || at == word.size() || word[at] != ':') {
    return std::nullopt;
  }
  return Pair{index, at + 1};
}

void note(std::string_view line, LibsvmFacts& facts) noexcept {
  Words words(line);
  words.next();  // the label
  bool more = words.next();
  if (more && words.word().starts_with(kQuery)) {
    facts.queries = true;
    more = words.next();
  }
  const auto first = more ? to_pair(words.word()) : std::nullopt;
  if (!first) {
    return;
  }
  const std::string_view all = words.line();
  const std::size_t end = all.find_last_not_of(" \t\r") + 1;
  const std::size_t begin = all.find_last_of(" \t\r", end - 1) + 1;
  const auto last = to_pair(all.substr(begin, end - begin));
  if (!last) {
    return;
  }
  facts.smallest = facts.any ? std::min(facts.smallest, first->index) : first->index;
  facts.largest = std::max({facts.largest, first->index, last->index});
  facts.any = true;
}

}  // namespace

FileIndex scan_libsvm(const File& file, bool skip) {
  LibsvmFacts facts;
  FileIndex index = scan_lines(file, {.rules = {.comment = '#'}, .skip = skip},
                               [&facts](std::string_view line) { note(line, facts); });
  index.set_note(std::to_string(facts.smallest) + " " + std::to_string(facts.largest) + " " +
                 std::to_string(facts.any) + " " + std::to_string(facts.queries));
  return index;
}

LibsvmFacts libsvm_facts(const Index& index) {
  LibsvmFacts all;
  for (std::size_t i = 0; i < index.files().size(); ++i) {
    std::istringstream note(index.part(i).note());
    LibsvmFacts facts;
    if (!(note >> facts.smallest >> facts.largest >> facts.any >> facts.queries)) {
      throw std::invalid_argument("the index of " + index.files()[i]->path() + " is not one of libsvm records");
    }
    if (facts.any) {
      all.smallest = all.any ? std::min(all.smallest, facts.smallest) : facts.smallest;
      all.largest = std::max(all.largest, facts.largest);
    }
    all.any = all.any || facts.any;
    all.queries = all.queries || facts.queries;
  }
  return all;
}

LibsvmCodec::LibsvmCodec(const LibsvmRules& rules) : rules_(rules) {
  if (!is_text_number(rules.dtype) || !is_floating(rules.dtype)) {
    throw std::invalid_argument(std::string("dtype is ") + name_of(rules.dtype) + "; expected float32 or float64");
  }
  fields_.push_back({"label_values", Kind::fixed, rules.dtype, {1}});
  fields_.push_back({"values", Kind::sparse, rules.dtype, {rules.features}});
  if (rules.queries) {
    fields_.push_back({"qid", Kind::fixed, DType::int64, {}});
  }
}

void LibsvmCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                         Batch& batch, State&) const {
  if (rules_.dtype == DType::float32) {
    decode_as<float>(record, place, file, row, batch);
  } else {
    decode_as<double>(record, place, file, row, batch);
  }
}

template <typename T>
void LibsvmCodec::decode_as(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                            Batch& batch) const {
  const std::string_view line = without_line_end(record);
  const QuickText quick(line);
  Words words(line);
  const auto fail = [&](Problem problem, const std::string& text) {
    const std::uint64_t offset = place.offset + words.at();
    throw DataError(problem, file.path(), offset, place.number, text + line_number(file, offset));
  };
  const auto number_at = [&](std::size_t at, std::size_t bytes, T& number) {
    if (quick_number(quick.at(at), bytes, number)) {
      return true;
    }
    const auto exact = parse_number<T>(line.substr(at, bytes));
    number = exact.value_or(0);
    return exact.has_value();
  };

  T label = 0;
  if (!words.next() || !number_at(words.at(), words.word().size(), label)) {
    const std::string_view word = words.word();
    if (word.find(',') != std::string_view::npos) {
      fail(Problem::mismatch, "several labels, " + shown(word) + "; expected one number");
    }
    fail(Problem::malformed, "the line begins with " + shown(word) + "; expected a label, a number");
  }
  *batch.columns[0].fixed_row<T>(row, 1) = label;

  bool more = words.next();
  if (more && words.word().starts_with(kQuery)) {
    const auto query = parse_number<std::int64_t>(words.word().substr(kQuery.size()));
    if (!query) {
      fail(Problem::malformed, "found " + shown(words.word()) + "; expected qid: and a whole number");
    }
    if (rules_.queries) {
      *batch.columns[2].fixed_row<std::int64_t>(row, 1) = *query;
    }
    more = words.next();
  } else if (rules_.queries) {
    fail(Problem::mismatch, "the record has no qid; expected one, since the field qid is asked for");
  }

  Column& column = batch.columns[1];
  const std::size_t most =
      (line.size() - std::min(line.size(), words.at())) / 3 + 1;  // "1:2" is the shortest, and a blank
  auto* const values = reinterpret_cast<T*>(append(column, row, most, sizeof(T)));
  std::uint64_t* const keys = append_keys(column, row, most);
  const std::uint64_t base = rules_.zero_based ? 0 : 1;
  std::size_t count = 0;
  for (; more; more = words.next()) {
    const std::string_view word = words.word();
    const auto pair = to_pair(word);
    if (!pair || !number_at(words.at() + pair->value, word.size() - pair->value, values[count])) {
      fail(Problem::malformed, "found " + shown(word) + "; expected index:value, a whole number and a number");
    }
    const std::uint64_t key = pair->index - base;
    if (pair->index < base || key >= rules_.features) {
      fail(Problem::mismatch, "index " + std::to_string(pair->index) + " is none of " +
                                  std::to_string(rules_.features) + (base == 0 ? " zero-based" : " one-based") +
                                  " features; is zero_based or features another?");
    }
    if (count != 0 && key <= keys[count - 1]) {
      fail(Problem::mismatch, "index " + std::to_string(pair->index) + " comes after " +
                                  std::to_string(keys[count - 1] + base) +
                                  "; expected indices that grow, each of them once");
    }
    keys[count++] = key;
  }
  column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(count);
}

std::shared_ptr<const Source> libsvm_source(Index index, const LibsvmRules& rules) {
  return std::make_shared<IndexedSource<LibsvmCodec>>(std::move(index), LibsvmCodec(rules));
}

}  // namespace launcher::data
