// Where the lines of a text file are.
#ifndef LAUNCHER_DATA_LINES_H
#define LAUNCHER_DATA_LINES_H

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "index.h"
#include "source.h"

namespace launcher::data {

inline constexpr std::size_t kTextBlock = 64;

// A bit for each of the 64 characters: whether it is one of the two.
inline std::uint64_t marks_of(const char* block, char first, char second) noexcept {
  std::uint64_t bits = 0;
#ifdef __SSE2__
  const __m128i a = _mm_set1_epi8(first);
  const __m128i b = _mm_set1_epi8(second);
  for (std::size_t i = 0; i < kTextBlock; i += sizeof(__m128i)) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + i));
    const auto found = _mm_movemask_epi8(_mm_or_si128(_mm_cmpeq_epi8(part, a), _mm_cmpeq_epi8(part, b)));
    bits |= static_cast<std::uint64_t>(static_cast<unsigned>(found)) << i;
  }
#else
  for (std::size_t i = 0; i < kTextBlock; ++i) {
    bits |= static_cast<std::uint64_t>(block[i] == first || block[i] == second) << i;
  }
#endif
  return bits;
}

// Which lines are records. A line ends with "\n", the last one also with the file; "\r" before it is no part of it.
struct LineRules {
  char quote = '\0';      // between two of these a newline is like any other character; '\0': everywhere it ends a line
  char delimiter = '\0';  // of fields: a quote opens at the start of a line or after one of these, elsewhere it is text
  char comment = '\0';    // a line that begins with it, after any blanks, is no record; '\0': there are none
  bool keep_blank = false;  // whether a line of nothing but blanks (space, tab; never the delimiter) is a record
};

// Finds lines in a file that comes in pieces.
class LineFramer {
 public:
  explicit LineFramer(const LineRules& rules) noexcept : rules_(rules) {}

  // Looks through the next bytes of the file, and calls found(begin, end) for each record that ends in them: offsets in
  // the file, the newline included.
  template <typename Found>
  void feed(std::string_view bytes, Found&& found);
  // The file ends here: found(begin, end) for a last line without a newline. False: it ends between two quotes, and
  // what begins at line_begin() is no record.
  template <typename Found>
  bool finish(Found&& found);

  std::uint64_t line_begin() const noexcept { return line_begin_; }
  std::uint64_t offset() const noexcept { return offset_; }  // of the next byte that is fed

 private:
  enum class Lead : std::uint8_t { blank, comment, content };  // what the line has had up to here
  enum class Quoted : std::uint8_t { no, yes, perhaps };       // perhaps: after a quote that the next byte may double

  Lead lead(std::string_view text) const noexcept;
  // From `at`, which is between quotes, to what follows the closing one; text.size() when it is not there.
  std::size_t leave_quotes(std::string_view text, std::size_t at) noexcept;
  bool opens_field(std::string_view bytes, std::size_t at) const noexcept {
    const std::uint64_t place = offset_ + at;
    return place == line_begin_ || (at == 0 ? last_ : bytes[at - 1]) == rules_.delimiter;
  }

  template <typename Found>
  void end_line(std::string_view bytes, std::size_t end, Found& found) {
    const std::uint64_t begin = line_begin_;
    line_begin_ = offset_ + end;
    if (!rules_.keep_blank && lead_ != Lead::content) {
      const std::size_t from = begin > offset_ ? static_cast<std::size_t>(begin - offset_) : 0;
      if (lead_ == Lead::comment || lead(bytes.substr(from, end - from)) != Lead::content) {
        lead_ = Lead::blank;
        return;
      }
    }
    lead_ = Lead::blank;
    found(begin, offset_ + end);
  }

  LineRules rules_;
  std::uint64_t offset_ = 0, line_begin_ = 0;
  Quoted quoted_ = Quoted::no;
  Lead lead_ = Lead::blank;  // of the part of the line before offset_
  char last_ = '\n';         // the byte before offset_
};

template <typename Found>
void LineFramer::feed(std::string_view bytes, Found&& found) {
  if (bytes.empty()) {
    return;
  }
  const char quote = rules_.quote == '\0' ? '\n' : rules_.quote;
  std::size_t at = quoted_ == Quoted::no ? 0 : leave_quotes(bytes, 0);
  char padded[kTextBlock];
  while (at < bytes.size()) {
    const char* block = bytes.data() + at;
    if (bytes.size() - at < kTextBlock) {
      std::memset(padded, 0, kTextBlock);
      std::memcpy(padded, block, bytes.size() - at);
      block = padded;
    }
    std::size_t next = std::min(at + kTextBlock, bytes.size());
    for (std::uint64_t marks = marks_of(block, '\n', quote); marks != 0; marks &= marks - 1) {
      const std::size_t place = at + static_cast<std::size_t>(std::countr_zero(marks));
      if (bytes[place] == '\n') {
        end_line(bytes, place + 1, found);
      } else if (opens_field(bytes, place)) {
        next = leave_quotes(bytes, place + 1);
        break;
      }
    }
    at = next;
  }
  if (lead_ == Lead::blank) {
    const std::size_t from = line_begin_ > offset_ ? static_cast<std::size_t>(line_begin_ - offset_) : 0;
    lead_ = lead(bytes.substr(from));
  }
  last_ = bytes.back();
  offset_ += bytes.size();
}

template <typename Found>
bool LineFramer::finish(Found&& found) {
  if (quoted_ == Quoted::yes) {
    return false;
  }
  if (line_begin_ < offset_) {
    end_line({}, 0, found);
  }
  return true;
}

struct LineScan {
  LineRules rules;
  bool header = false;  // the first record is none: it holds the names of the columns, and becomes the index's note
  bool skip = false;    // what is damaged goes to the index's damage, and is not thrown
};

// The records of a text file. A byte order mark at its start is left out. `look` is called with each record, without
// its line end; may be empty. Throws DataError: truncated (a quoted field without an end), or what reading throws.
FileIndex scan_lines(const File& file, const LineScan& scan, const std::function<void(std::string_view)>& look = {});

// The first record of an index that has one, without its line end.
std::optional<std::string> first_record(const Index& index);

// A record as it is in the file, less its line end.
std::string_view without_line_end(std::span<const std::byte> record) noexcept;
std::string_view without_line_end(std::string_view line) noexcept;

// " (line 7)", counted from 1, for messages: the newlines before `offset` are counted. Empty far into a large file,
// where to count would take long, and where the file can not be read.
std::string line_number(const File& file, std::uint64_t offset);

// Lines as they are: the field "data", ragged uint8, without line ends.
class LinesCodec {
 public:
  struct State {};

  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  std::vector<Field> fields_{{"data", Kind::ragged, DType::uint8, {}}};
};

std::shared_ptr<const Source> lines_source(Index index);

}  // namespace launcher::data

#endif
