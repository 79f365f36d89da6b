#include "record_proto_codec.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "near.h"

namespace launcher::data {
namespace {

constexpr std::size_t kNoColumn = ~std::size_t{0};

std::string describe(const std::vector<std::uint64_t>& shape) {
  std::string text = "(";
  for (const std::uint64_t size : shape) {
    text += (text.size() == 1 ? "" : ", ") + std::to_string(size);
  }
  return text + ")";
}

[[noreturn]] void refuse(const RecordProtoCodec::Origin& origin, const std::string& text) {
  throw DataError(Problem::mismatch, origin.file, origin.record_offset, origin.number,
                  text + "; all records of a channel must have the same fields (on_bad can leave this one out)");
}

[[noreturn]] void refuse(const RecordProtoCodec::Origin& origin, const TensorField& field, const std::string& found,
                         const std::string& wanted) {
  refuse(origin, "field '" + field.field.name + "': found " + found + ", wanted " + wanted);
}

// The error of a message that can not be read: at its place in the file where that is known.
DataError malformed(const WireError& error, Chunk payload, const RecordProtoCodec::Origin& origin) {
  const std::uint64_t inside = static_cast<std::uint64_t>(error.where - payload.data());
  const bool joined = origin.payload_offset == kNowhere;
  const std::string where = joined ? " (byte " + std::to_string(inside) + " of the record's joined parts)" : "";
  return {Problem::malformed, origin.file, joined ? origin.record_offset : origin.payload_offset + inside,
          origin.number, std::string(error.what) + where + "; this is no such message, or it is damaged"};
}

std::size_t value_size(const TensorField& field) { return size_of(field.field.dtype); }

std::uint64_t count_values(const TensorField& field, const Tensor& tensor) {
  return is_of_varints(field.type) ? count_varints(tensor.values) : tensor.value_bytes() / value_size(field);
}

void copy_values(const TensorField& field, const Tensor& tensor, std::byte* out) {
  for (const Chunk chunk : tensor.values) {
    if (is_of_varints(field.type)) {
      out = decode_numbers(field.type, chunk, out);
    } else if (!chunk.empty()) {
      std::memcpy(out, chunk.data(), chunk.size());
      out += chunk.size();
    }
  }
}

// Dense records of one dimension may come without a shape; a scalar is one value.
bool is_dense_shape(const std::vector<Chunk>& chunks, std::uint64_t values, const std::vector<std::uint64_t>& wanted) {
  if (count_varints(chunks) == 0) {
    return wanted.size() <= 1;
  }
  return is_shape(chunks, wanted.empty() ? std::span(&values, 1) : std::span(wanted));
}

std::uint64_t load(const std::byte* from) noexcept {
  std::uint64_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

// Pieces are of some 10 bytes: a call of memcmp() would take longer than this.
bool equal(const std::byte* left, const std::byte* right, std::size_t bytes) noexcept {
  constexpr std::size_t kWord = sizeof(std::uint64_t);
  if (bytes < kWord) {
    return std::equal(left, left + bytes, right);
  }
  std::uint64_t difference = load(left + bytes - kWord) ^ load(right + bytes - kWord);
  for (std::size_t i = 0; i + kWord < bytes; i += kWord) {
    difference |= load(left + i) ^ load(right + i);
  }
  return difference == 0;
}

// Whether `chunk` is as many varints as the field has values, which are then in `out` (null: they are not wanted).
bool predicted_numbers(Chunk chunk, const TensorField& field, std::byte* out) {
  if (count_varints(chunk) != field.values || static_cast<std::uint8_t>(chunk.back()) >= 0x80) {
    return false;
  }
  try {
    if (out != nullptr) {
      decode_numbers(field.type, chunk, out);
    } else {
      check_varints({&chunk, 1});
    }
  } catch (const WireError&) {
    return false;  // the walk says what is wrong with it
  }
  return true;
}

}  // namespace

RecordProtoCodec::RecordProtoCodec(RecordSchema schema, const std::vector<std::size_t>& columns, Dialects dialects)
    : schema_(std::move(schema)), column_of_(schema_.fields.size(), kNoColumn), dialects_(std::move(dialects)) {
  for (const std::size_t field : columns) {
    if (field >= schema_.fields.size() || column_of_[field] != kNoColumn) {
      throw std::invalid_argument("a field is asked for twice, or is none of the schema");
    }
    column_of_[field] = given_.size();
    given_.push_back(schema_.fields[field].field);
  }
  for (const TensorField& field : schema_.fields) {
    predictable_ = predictable_ && field.field.kind == Kind::fixed;
  }
}

void RecordProtoCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                              Batch& batch, State& state) const {
  const auto length = single_frame(record);
  if (length && record.size() - kFrameHeaderBytes - *length < 4) {
    const Origin origin{file.path(), place.offset, place.number, place.offset + kFrameHeaderBytes};
    decode_payload(record.subspan(kFrameHeaderBytes, *length), origin, row, batch, state);
    return;
  }
  const Frames frames = indexed_frames(record, place, file);
  const Origin origin{file.path(), place.offset, place.number, kNowhere};
  const Dialect dialect = dialects_.of(frames, place.file, file);
  const auto decode_as = [&](Dialect one) {
    decode_payload(payload_of(record, frames, one, state.joined), origin, row, batch, state);
  };
  if (!dialects_.automatic() || dialect == Dialect::plain) {
    decode_as(dialect);
    return;
  }
  // Nothing proves a dialect: the one in which the record is a message that fits.
  try {
    decode_as(Dialect::dmlc);
  } catch (const DataError& error) {
    try {
      decode_as(Dialect::plain);
    } catch (const DataError&) {
      throw error;
    }
  }
}

void RecordProtoCodec::decode_payload(Chunk payload, const Origin& origin, std::size_t row, Batch& batch,
                                      State& state) const {
  Skeleton& skeleton = state.skeletons[payload.size() % state.skeletons.size()];
  if (predicted(payload, row, batch, skeleton)) {
    return;
  }
  try {
    walk(payload, origin, row, batch, state);
  } catch (const WireError& error) {
    throw malformed(error, payload, origin);
  }
  if (predictable_) {
    remember(payload, state.tensors, skeleton);
  }
}

bool RecordProtoCodec::predicted(Chunk payload, std::size_t row, Batch& batch, const Skeleton& skeleton) const {
  if (payload.size() != skeleton.bytes || skeleton.bytes == 0) {
    return false;
  }
  const std::byte* expected = skeleton.expected.data();
  for (const Skeleton::Piece& piece : skeleton.pieces) {
    if (!equal(payload.data() + piece.offset, expected, piece.bytes)) {
      return false;
    }
    expected += piece.bytes;
  }
  for (const Skeleton::Copy& copy : skeleton.copies) {
    const Chunk values = payload.subspan(copy.from.offset, copy.from.bytes);
    if (copy.row_bytes == 0) {
      const TensorField& field = schema_.fields[copy.field];
      std::byte* out = nullptr;
      if (copy.column != kNoColumn) {
        out = batch.columns[copy.column].values.data() + row * field.values * value_size(field);
      }
      if (!predicted_numbers(values, field, out)) {
        return false;
      }
    } else if (copy.column != kNoColumn) {
      copy_near(batch.columns[copy.column].values.data() + row * copy.row_bytes, values.data(), values.size());
    }
  }
  return true;
}

void RecordProtoCodec::remember(Chunk payload, const std::vector<Tensor>& tensors, Skeleton& skeleton) const {
  skeleton.bytes = 0;
  skeleton.pieces.clear();
  skeleton.expected.clear();
  skeleton.copies.clear();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].values.size() > 1) {
      return;  // in several chunks: rare, and then the walk does it
    }
    if (!tensors[i].values.empty() && !tensors[i].values[0].empty()) {
      const Chunk values = tensors[i].values[0];
      const TensorField& field = schema_.fields[i];
      const std::size_t row_bytes =
          is_of_varints(field.type) ? 0 : static_cast<std::size_t>(field.values) * value_size(field);
      skeleton.copies.push_back(
          {{static_cast<std::size_t>(values.data() - payload.data()), values.size()}, i, column_of_[i], row_bytes});
    }
  }
  std::sort(skeleton.copies.begin(), skeleton.copies.end(),
            [](const auto& left, const auto& right) { return left.from.offset < right.from.offset; });
  std::size_t at = 0;
  const auto add_piece = [&](std::size_t end) {
    if (end != at) {
      skeleton.pieces.push_back({at, end - at});
      skeleton.expected.insert(skeleton.expected.end(), payload.begin() + static_cast<std::ptrdiff_t>(at),
                               payload.begin() + static_cast<std::ptrdiff_t>(end));
    }
  };
  for (const Skeleton::Copy& copy : skeleton.copies) {
    add_piece(copy.from.offset);
    at = copy.from.offset + copy.from.bytes;
  }
  add_piece(payload.size());
  skeleton.bytes = payload.size();
}

void RecordProtoCodec::walk(Chunk payload, const Origin& origin, std::size_t row, Batch& batch, State& state) const {
  state.tensors.resize(schema_.fields.size());
  for (Tensor& tensor : state.tensors) {
    tensor.clear();
  }
  walk_message(schema_.form, payload, state.walk, [&](bool label, std::string_view key) -> Tensor* {
    for (std::size_t i = 0; i < schema_.fields.size(); ++i) {
      if (schema_.fields[i].label == label && schema_.fields[i].key == key) {
        return &state.tensors[i];
      }
    }
    if (schema_.complete) {
      refuse(origin, std::string("found the key '") + std::string(key) + "' in the map " +
                         (label ? "label" : "features") +
                         ", which the first record has not; name the fields to read "
                         "if it is to be left out");
    }
    return nullptr;
  });
  for (std::size_t i = 0; i < schema_.fields.size(); ++i) {
    const std::size_t column = column_of_[i];
    store(schema_.fields[i], state.tensors[i], column == kNoColumn ? nullptr : &batch.columns[column], origin, row);
  }
}

void RecordProtoCodec::store(const TensorField& field, const Tensor& tensor, Column* column, const Origin& origin,
                             std::size_t row) const {
  if (!tensor.present) {
    refuse(origin, field, "no such key in this record", name_of(field.type));
  }
  if (tensor.type != field.type) {
    refuse(origin, field, name_of(tensor.type), name_of(field.type));
  }
  switch (field.field.kind) {
    case Kind::fixed:
      store_fixed(field, tensor, column, origin, row);
      return;
    case Kind::sparse:
      store_sparse(field, tensor, column, origin, row);
      return;
    case Kind::ragged:
      store_ragged(field, tensor, column, origin, row);
      return;
  }
}

void RecordProtoCodec::store_fixed(const TensorField& field, const Tensor& tensor, Column* column, const Origin& origin,
                                   std::size_t row) const {
  const std::uint64_t count = count_values(field, tensor);
  if (count_varints(tensor.keys) != 0) {
    refuse(origin, field, "a sparse tensor", "a dense one of shape " + describe(field.field.shape));
  }
  if (!is_dense_shape(tensor.shape, field.values, field.field.shape)) {
    const auto shape = decode_shape(tensor.shape);
    refuse(origin, field, shape.empty() ? "no shape" : "the shape " + describe(shape), describe(field.field.shape));
  }
  if (count != field.values) {
    refuse(origin, field, std::to_string(count) + " values",
           std::to_string(field.values) + " for the shape " + describe(field.field.shape));
  }
  if (column != nullptr) {
    copy_values(field, tensor, column->values.data() + row * field.values * value_size(field));
  } else if (is_of_varints(field.type)) {
    check_varints(tensor.values);
  }
}

void RecordProtoCodec::store_sparse(const TensorField& field, const Tensor& tensor, Column* column,
                                    const Origin& origin, std::size_t row) const {
  const std::uint64_t count = count_values(field, tensor);
  const std::uint64_t keys = count_varints(tensor.keys);
  if (!is_shape(tensor.shape, field.field.shape)) {
    const auto shape = decode_shape(tensor.shape);
    refuse(origin, field, shape.empty() ? "no shape" : "the shape " + describe(shape), describe(field.field.shape));
  }
  if (keys != count) {
    refuse(origin, field, std::to_string(count) + " values with " + std::to_string(keys) + " keys",
           keys == 0 ? "a sparse tensor" : "as many keys as values");
  }
  if (column == nullptr) {
    check_varints(tensor.keys);
    return;
  }
  std::uint64_t* key = append_keys(*column, row, count);
  decode_keys(tensor.keys, key);
  std::uint64_t largest = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    largest = std::max(largest, key[i]);
  }
  if (count != 0 && largest >= field.values) {
    refuse(origin, field, "the key " + std::to_string(largest),
           "less than " + std::to_string(field.values) + " for the shape " + describe(field.field.shape));
  }
  copy_values(field, tensor, append(*column, row, count, value_size(field)));
  column->offsets[row + 1] = column->offsets[row] + static_cast<std::int64_t>(count);
}

void RecordProtoCodec::store_ragged(const TensorField& field, const Tensor& tensor, Column* column,
                                    const Origin& origin, std::size_t row) const {
  if (is_of_bytes(field.type) && tensor.values.size() > 1) {
    refuse(origin, field, std::to_string(tensor.values.size()) + " byte strings", "one in each record");
  }
  if (count_varints(tensor.keys) != 0 || count_varints(tensor.shape) > 1) {
    refuse(origin, field, "a sparse tensor or one of several dimensions", "a dense one of one dimension");
  }
  const std::uint64_t count = count_values(field, tensor);
  if (!is_dense_shape(tensor.shape, count, {})) {
    refuse(origin, field, std::to_string(count) + " values for the shape " + describe(decode_shape(tensor.shape)),
           "as many as the shape tells");
  }
  if (column == nullptr) {
    if (is_of_varints(field.type)) {
      check_varints(tensor.values);
    }
    return;
  }
  copy_values(field, tensor, append(*column, row, count, value_size(field)));
  column->offsets[row + 1] = column->offsets[row] + static_cast<std::int64_t>(count);
}

RecordSchema infer_schema(MessageForm form, Chunk payload, const RecordProtoCodec::Origin& origin) {
  try {
    return {form, infer_fields(form, payload), true};
  } catch (const WireError& error) {
    throw malformed(error, payload, origin);
  } catch (const std::invalid_argument& error) {
    throw DataError(Problem::mismatch, origin.file, origin.record_offset, origin.number, error.what());
  }
}

std::span<const std::byte> first_record(const Index& index, Buffer& memory) {
  if (index.records() == 0) {
    throw DataError(Problem::mismatch, index.files().empty() ? "channel" : index.files()[0]->path(), kNowhere, kNowhere,
                    "there is no record to tell the fields; name them, with their types and shapes");
  }
  const Place place = index.place(0);
  const File& file = *index.files()[place.file];
  if (!file.mapped()) {
    memory.reserve(static_cast<std::size_t>(place.bytes), 0);
  }
  return file.view(place.offset, static_cast<std::size_t>(place.bytes), memory.data());
}

RecordSchema infer_schema(const Index& index, Dialect dialect) {
  Buffer memory, joined;
  const auto record = first_record(index, memory);
  const Place place = index.place(0);
  const File& file = *index.files()[place.file];
  const Frames frames = indexed_frames(record, place, file);
  const std::uint64_t begin = frames.parts == 1 ? place.offset + kFrameHeaderBytes : kNowhere;
  const RecordProtoCodec::Origin origin{file.path(), place.offset, place.number, begin};
  const auto infer_as = [&](Dialect one) {
    return infer_schema(MessageForm::record, payload_of(record, frames, one, joined), origin);
  };
  if (frames.parts == 1) {
    return infer_as(Dialect::plain);  // one part is itself in either; to ask the file would take a walk through it
  }
  const Dialect known = Dialects(dialect, index.files().size()).of(frames, place.file, file);
  if (dialect != Dialect::automatic || known == Dialect::plain) {
    return infer_as(known);
  }
  try {
    return infer_as(Dialect::dmlc);
  } catch (const DataError& error) {
    try {
      return infer_as(Dialect::plain);
    } catch (const DataError&) {
      throw error;
    }
  }
}

}  // namespace launcher::data
