#include "stream_codecs.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <system_error>

namespace launcher::data {
namespace {

constexpr std::size_t kShown = 40;  // of a text that is no number, in its error

template <typename T>
bool parse(std::string_view text, std::byte* to) noexcept {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    return false;
  }
  std::memcpy(to, &value, sizeof value);
  return true;
}

bool parse(DType dtype, std::string_view text, std::byte* to) noexcept {
  switch (dtype) {
    case DType::float32:
      return parse<float>(text, to);
    case DType::float64:
      return parse<double>(text, to);
    default:
      return parse<std::int64_t>(text, to);
  }
}

}  // namespace

AttributesCodec::AttributesCodec(std::vector<Field> fields, Dialect dialect)
    : fields_(std::move(fields)), dialect_(dialect) {
  for (const Field& field : fields_) {
    const bool bytes = field.kind == Kind::ragged && field.dtype == DType::uint8;
    const bool number = field.kind == Kind::fixed && field.shape.empty() &&
                        (field.dtype == DType::float32 || field.dtype == DType::float64 || field.dtype == DType::int64);
    if (!bytes && !number) {
      throw std::invalid_argument("attribute " + field.name + " can be bytes, float32, float64 or int64");
    }
  }
}

void AttributesCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                             Batch& batch, State& state) const {
  std::size_t at = 0;
  for (std::size_t i = 0; i < fields_.size(); ++i) {
    const Field& field = fields_[i];
    const std::span<const std::byte> rest = record.subspan(at);
    const Frames frames = read_frames(rest, true);
    if (frames.fault != FrameFault::none) {
      throw frame_error(frames, file.path(), place.offset + at, place.offset + record.size(), place.number);
    }
    const Dialect proven = frames.plain ? Dialect::plain : Dialect::dmlc;
    const std::span<const std::byte> payload =
        payload_of(rest.first(static_cast<std::size_t>(frames.bytes)), frames,
                   dialect_ == Dialect::automatic ? proven : dialect_, state.memory);
    Column& column = batch.columns[i];
    if (field.kind == Kind::ragged) {
      std::byte* to = append(column, row, payload.size(), 1);
      if (!payload.empty()) {
        std::memcpy(to, payload.data(), payload.size());
      }
      column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(payload.size());
    } else {
      const std::string_view text(reinterpret_cast<const char*>(payload.data()), payload.size());
      if (!parse(field.dtype, text, column.values.data() + row * size_of(field.dtype))) {
        throw DataError(Problem::mismatch, file.path(), place.offset + at, place.number,
                        "attribute " + field.name + " is \"" + std::string(text.substr(0, kShown)) +
                            "\", expected the number that the loader was told it is; take it as bytes");
      }
    }
    at += static_cast<std::size_t>(frames.bytes);
  }
}

FixedCodec::FixedCodec(std::vector<Field> fields, const std::vector<std::size_t>& offsets, std::size_t stride)
    : fields_(std::move(fields)), stride_(stride) {
  if (offsets.size() != fields_.size()) {
    throw std::invalid_argument("each field has one offset");
  }
  for (std::size_t i = 0; i < fields_.size(); ++i) {
    const std::size_t bytes = static_cast<std::size_t>(fields_[i].values()) * size_of(fields_[i].dtype);
    if (fields_[i].kind != Kind::fixed || offsets[i] > stride || bytes > stride - offsets[i]) {
      throw std::invalid_argument("field " + fields_[i].name + " is not inside a record of " + std::to_string(stride) +
                                  " bytes");
    }
    pieces_.push_back({offsets[i], bytes});
  }
}

void FixedCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                        Batch& batch, State&) const {
  if (record.size() != stride_) {
    throw DataError(Problem::truncated, file.path(), place.offset, place.number,
                    "a record of " + std::to_string(record.size()) + " bytes, expected " + std::to_string(stride_));
  }
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    std::memcpy(batch.columns[i].values.data() + row * pieces_[i].bytes, record.data() + pieces_[i].offset,
                pieces_[i].bytes);
  }
}

}  // namespace launcher::data
