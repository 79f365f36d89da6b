// Records of JSON Lines.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "indexed_source.h"
#include "json.h"
#include "lines.h"
#include "numbers.h"
#include "text.h"

namespace launcher::data {
namespace {

constexpr std::size_t kDeepestShape = 32;  // as many dimensions as numpy had for long

[[noreturn]] void mismatch(const JsonCursor& cursor, const std::string& text) {
  throw JsonError(text, cursor.offset(), false);
}

const char* name_of(JsonKind kind) noexcept {
  constexpr const char* names[] = {"an object", "an array", "a string", "a number", "true or false", "null"};
  return names[static_cast<std::size_t>(kind)];
}

template <typename T>
void store(T value, std::byte*& out) noexcept {
  std::memcpy(out, &value, sizeof(T));
  out += sizeof(T);
}

template <typename T>
void read_number(JsonCursor& cursor, DType dtype, std::byte*& out) {
  const JsonKind kind = cursor.kind();
  if constexpr (std::is_floating_point_v<T>) {
    if (kind == JsonKind::null) {
      cursor.null();
      store(std::numeric_limits<T>::quiet_NaN(), out);
      return;
    }
  }
  if (kind != JsonKind::number) {
    mismatch(cursor, std::string(name_of(kind)) + "; expected a number");
  }
  const std::size_t offset = cursor.offset();
  const bool readable = cursor.left() >= kQuickReach;
  const std::string_view text = cursor.number();
  if (T quick = 0; readable && quick_number(text.data(), text.size(), quick)) {
    return store(quick, out);
  }
  const auto number = parse_number<T>(text);
  if (!number) {
    throw JsonError(shown(text) + " is no whole number that fits " + data::name_of(dtype) +
                        "; another type can be given to the field",
                    offset, false);
  }
  store(*number, out);
}

void read_scalar(JsonCursor& cursor, DType dtype, std::byte*& out) {
  switch (dtype) {
    case DType::float32:
      return read_number<float>(cursor, dtype, out);
    case DType::float64:
      return read_number<double>(cursor, dtype, out);
    case DType::int32:
      return read_number<std::int32_t>(cursor, dtype, out);
    case DType::int64:
      return read_number<std::int64_t>(cursor, dtype, out);
    default:
      if (const JsonKind kind = cursor.kind(); kind != JsonKind::boolean) {
        mismatch(cursor, std::string(name_of(kind)) + "; expected true or false");
      }
      return store<std::uint8_t>(cursor.boolean() ? 1 : 0, out);
  }
}

void read_fixed(JsonCursor& cursor, const Field& field, std::size_t dimension, std::byte*& out) {
  if (dimension == field.shape.size()) {
    return read_scalar(cursor, field.dtype, out);
  }
  if (const JsonKind kind = cursor.kind(); kind != JsonKind::array) {
    mismatch(cursor, std::string(name_of(kind)) + "; expected an array");
  }
  const std::size_t begin = cursor.offset();
  const std::uint64_t wanted = field.shape[dimension];
  std::uint64_t count = 0;
  for (bool more = cursor.enter_array(); more; more = cursor.next_element()) {
    if (++count > wanted) {
      throw JsonError("an array of more than " + std::to_string(wanted) + " elements; expected so many", begin, false);
    }
    read_fixed(cursor, field, dimension + 1, out);
  }
  if (count != wanted) {
    throw JsonError("an array of " + std::to_string(count) + " elements; expected " + std::to_string(wanted), begin,
                    false);
  }
}

// What a value that is no text would be as a field, without a name.
struct Inferred {
  std::vector<std::uint64_t> shape;
  std::optional<DType> dtype;  // of an array of nothing: none
};

DType infer_scalar(JsonCursor& cursor) {
  switch (const JsonKind kind = cursor.kind(); kind) {
    case JsonKind::boolean:
      cursor.boolean();
      return DType::boolean;
    case JsonKind::number:
      return parse_number<std::int64_t>(cursor.number()) ? DType::int64 : DType::float32;
    default:
      mismatch(cursor, std::string(name_of(kind)) + ", which makes no field");
  }
}

DType wider(const JsonCursor& cursor, DType a, DType b) {
  if (a != b && (a == DType::boolean || b == DType::boolean)) {
    mismatch(cursor, "numbers and booleans in one array");
  }
  return a == b ? a : DType::float32;
}

// Of the value that is next, which is stepped over.
Inferred infer(JsonCursor& cursor, std::size_t depth) {
  if (cursor.kind() != JsonKind::array) {
    return {{}, infer_scalar(cursor)};
  }
  if (depth == kDeepestShape) {
    mismatch(cursor, "arrays nested more than " + std::to_string(kDeepestShape) + " deep");
  }
  Inferred all;
  std::uint64_t count = 0;
  for (bool more = cursor.enter_array(); more; more = cursor.next_element()) {
    Inferred element = infer(cursor, depth + 1);
    if (count++ == 0) {
      all = std::move(element);
      continue;
    }
    if (element.shape != all.shape) {
      mismatch(cursor, "elements of several lengths in one array");
    }
    if (all.dtype && element.dtype) {
      all.dtype = wider(cursor, *all.dtype, *element.dtype);
    }
  }
  all.shape.insert(all.shape.begin(), count);
  return all;
}

}  // namespace

std::vector<Field> json_fields(std::string_view line, std::span<const std::string> names) {
  JsonCursor cursor(line);
  std::vector<Field> fields;
  for (bool more = cursor.enter_object(); more; more = cursor.next_member()) {
    std::string key(cursor.key());
    if (!names.empty() && std::find(names.begin(), names.end(), key) == names.end()) {
      cursor.skip();
      continue;
    }
    Field& field = fields.emplace_back();
    field.name = std::move(key);
    const auto same = [&](const Field& other) { return &other != &field && other.name == field.name; };
    if (std::any_of(fields.begin(), fields.end(), same)) {
      mismatch(cursor, "the key " + shown(field.name) + " is there twice");
    }
    if (cursor.kind() == JsonKind::string) {
      field.kind = Kind::ragged;
      cursor.string();
      continue;
    }
    try {
      Inferred value = infer(cursor, 0);
      if (!value.dtype) {
        mismatch(cursor, "an array of nothing, which tells no type");
      }
      field.dtype = *value.dtype;
      field.shape = std::move(value.shape);
    } catch (const JsonError& error) {
      throw JsonError("key " + shown(field.name) + ": " + error.what() +
                          (error.malformed() ? "" : "; name the fields that are wanted, and their types"),
                      error.offset(), error.malformed());
    }
  }
  cursor.finish();
  return fields;
}

JsonCodec::JsonCodec(std::vector<Field> fields) : fields_(std::move(fields)) {
  for (const Field& field : fields_) {
    const bool number = is_text_number(field.dtype);
    const bool fixed = field.kind == Kind::fixed && (number || field.dtype == DType::boolean);
    const bool ragged = field.kind == Kind::ragged && (number || field.dtype == DType::uint8) && field.shape.empty();
    if (!(fixed || ragged) || field.shape.size() > kDeepestShape) {
      throw std::invalid_argument("field " + shown(field.name) + " is " + data::name_of(field.dtype) +
                                  "; expected float32, float64, int32, int64, bool, or text, in at most " +
                                  std::to_string(kDeepestShape) + " dimensions");
    }
  }
}

std::size_t JsonCodec::find(std::string_view key, std::size_t guess) const noexcept {
  for (std::size_t i = 0; i < fields_.size(); ++i) {
    const std::size_t field = guess + i < fields_.size() ? guess + i : guess + i - fields_.size();
    if (fields_[field].name == key) {
      return field;
    }
  }
  return fields_.size();
}

void JsonCodec::read(JsonCursor& cursor, const Field& field, Column& column, std::size_t row) const {
  if (field.kind == Kind::fixed) {
    const std::uint64_t bytes = field.values() * size_of(field.dtype);
    std::byte* out = column.values.data() + row * bytes;
    return read_fixed(cursor, field, 0, out);
  }
  const JsonKind kind = cursor.kind();
  std::int64_t& end = column.offsets[row + 1];
  if (field.dtype == DType::uint8) {
    if (kind != JsonKind::string) {
      mismatch(cursor, std::string(name_of(kind)) + "; expected a string");
    }
    const std::string_view text = cursor.string();
    if (!text.empty()) {
      std::memcpy(append(column, row, text.size(), 1), text.data(), text.size());
    }
    end = column.offsets[row] + static_cast<std::int64_t>(text.size());
    return;
  }
  if (kind != JsonKind::array) {
    mismatch(cursor, std::string(name_of(kind)) + "; expected an array");
  }
  const std::size_t bytes = size_of(field.dtype);
  std::byte* out = append(column, row, cursor.left() / 2 + 1, bytes);  // an element takes a digit, and a comma
  std::int64_t count = 0;
  for (bool more = cursor.enter_array(); more; more = cursor.next_element()) {
    read_scalar(cursor, field.dtype, out);
    ++count;
  }
  end = column.offsets[row] + count;
}

void JsonCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                       Batch& batch, State& state) const {
  JsonCursor cursor(without_line_end(record));
  std::size_t field = fields_.size();  // that is being read
  try {
    state.seen.assign(fields_.size(), 0);
    std::size_t found = 0;
    std::size_t guess = 0;  // the keys mostly come in the fields' order
    for (bool more = cursor.enter_object(); more; more = cursor.next_member()) {
      const std::size_t which = find(cursor.key(), guess);
      if (which == fields_.size()) {
        cursor.skip();
        continue;
      }
      field = which;
      if (state.seen[field]++ != 0) {
        mismatch(cursor, "the key is there twice");
      }
      read(cursor, fields_[field], batch.columns[field], row);
      guess = field + 1 == fields_.size() ? 0 : field + 1;
      field = fields_.size();
      ++found;
    }
    cursor.finish();
    if (found != fields_.size()) {
      field = static_cast<std::size_t>(std::find(state.seen.begin(), state.seen.end(), 0) - state.seen.begin());
      mismatch(cursor, "the record has no such key");
    }
  } catch (const JsonError& error) {
    const std::uint64_t offset = place.offset + error.offset();
    const std::string what = field == fields_.size() ? "" : "key " + shown(fields_[field].name) + ": ";
    throw DataError(error.malformed() ? Problem::malformed : Problem::mismatch, file.path(), offset, place.number,
                    what + error.what() + line_number(file, offset));
  }
}

std::shared_ptr<const Source> json_source(Index index, std::vector<Field> fields) {
  return std::make_shared<IndexedSource<JsonCodec>>(std::move(index), JsonCodec(std::move(fields)));
}

}  // namespace launcher::data
