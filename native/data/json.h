// JSON as RFC 8259 has it, read in one pass without a tree, and records that are lines of it (JSON Lines).
#ifndef LAUNCHER_DATA_JSON_H
#define LAUNCHER_DATA_JSON_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "index.h"
#include "source.h"

namespace launcher::data {

// Text that is no JSON, or not what was asked for.
class JsonError : public std::runtime_error {
 public:
  JsonError(const std::string& text, std::size_t offset, bool malformed)
      : std::runtime_error(text), offset_(offset), malformed_(malformed) {}
  std::size_t offset() const noexcept { return offset_; }  // in the text
  bool malformed() const noexcept { return malformed_; }   // false: JSON, but another value than the one asked for

 private:
  std::size_t offset_;
  bool malformed_;
};

enum class JsonKind : std::uint8_t { object, array, string, number, boolean, null };

// Walks through a text. All of it throws JsonError.
class JsonCursor {
 public:
  explicit JsonCursor(std::string_view text) noexcept : text_(text) {}

  std::size_t offset() const noexcept { return at_; }
  std::size_t left() const noexcept { return text_.size() - at_; }
  // What the next value is; it stays the next.
  JsonKind kind();

  //   for (bool more = cursor.enter_object(); more; more = cursor.next_member()) { ... cursor.key() ...; one value }
  // enter: false for an empty one; next: after a value; false after the last, then the object has been left.
  bool enter_object();
  bool next_member();
  bool enter_array();
  bool next_element();
  // The key of a member, before its value: without quotes, valid until the next key or string.
  std::string_view key();

  // Without quotes and escapes, UTF-8 as it is in the text; valid until the next key or string.
  std::string_view string();
  // As it is written: to be given to parse_number().
  std::string_view number();
  bool boolean();
  void null();
  // Over the next value, whatever it is: the text of it. It is checked like any other.
  std::string_view skip();
  // Throws if anything but blanks is left.
  void finish();

 private:
  static constexpr std::size_t kDeepest = 1024;  // arrays and objects inside each other

  [[noreturn]] void fail(const std::string& wanted) const;
  void skip_blanks() noexcept;
  bool take(char c) noexcept;
  void take_word(std::string_view word);
  bool begin(char open, char close, const char* wanted);
  bool next(char close, const char* wanted);
  std::string_view unescape(std::size_t begin);
  unsigned code_unit();

  std::string_view text_;
  std::size_t at_ = 0;
  std::string unescaped_;
};

// A field of JSON Lines is what the records have at the key of its name. fixed: a number or boolean, or arrays of them,
// nested and as long as the shape says; ragged uint8: a string, as UTF-8; ragged of another type: an array of numbers,
// as long as it likes. In a floating field null is NaN.

// The fields that a record's keys would be, in its order: a whole number is int64, any other float32, a boolean a
// boolean, a string ragged uint8; an array of numbers is float32 if one of them is. `names`: of these keys only, all if
// it is empty. Throws JsonError: a value is none of these.
std::vector<Field> json_fields(std::string_view line, std::span<const std::string> names);

// A key twice, or not there, or another value than the field's is a DataError, mismatch; what is no JSON object,
// malformed. Keys that are no field's are passed over.
class JsonCodec {
 public:
  struct State {
    std::vector<std::uint8_t> seen;  // one for each field
  };

  // Throws std::invalid_argument: a field that JSON can not be.
  explicit JsonCodec(std::vector<Field> fields);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  void read(JsonCursor& cursor, const Field& field, Column& column, std::size_t row) const;
  std::size_t find(std::string_view key, std::size_t guess) const noexcept;

  std::vector<Field> fields_;
};

std::shared_ptr<const Source> json_source(Index index, std::vector<Field> fields);

}  // namespace launcher::data

#endif
