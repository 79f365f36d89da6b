// The `Record` message of SageMaker's algorithms (package aialgs.data, proto2) and TensorFlow's `Example`, as they lie
// on the wire.
//
// Record: 1 map<string, Value> features, 2 map<string, Value> label; a map's entry is a message {1: key, 2: Value}.
// Value: one of 2 Float32Tensor, 3 Float64Tensor, 7 Int32Tensor, 9 Bytes. A tensor: 1 values, 2 keys, 3 shape, each
// packed or not, in any number of chunks. Bytes: 1 repeated bytes, 2 content type.
// Example: 1 Features; Features: 1 map<string, Feature>. Feature: one of 1 BytesList, 2 FloatList, 3 Int64List, each of
// one field: 1 repeated. Everything else is skipped.
#ifndef LAUNCHER_DATA_RECORD_PROTO_H
#define LAUNCHER_DATA_RECORD_PROTO_H

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "batch.h"
#include "wire.h"

namespace launcher::data {

using Chunk = std::span<const std::byte>;

enum class MessageForm : std::uint8_t { record, example };

// The fields of Value, and behind kFeature those of Feature.
inline constexpr std::uint8_t kFeature = 16;
enum class TensorType : std::uint8_t {
  none = 0,
  float32 = 2,
  float64 = 3,
  int32 = 7,
  bytes = 9,
  bytes_list = kFeature + 1,
  float_list = kFeature + 2,
  int64_list = kFeature + 3,
};

const char* name_of(TensorType type) noexcept;
constexpr bool is_of_varints(TensorType type) noexcept {
  return type == TensorType::int32 || type == TensorType::int64_list;
}
constexpr bool is_of_bytes(TensorType type) noexcept {
  return type == TensorType::bytes || type == TensorType::bytes_list;
}

// Where the parts of one Value or Feature are. Chunks of floating numbers are arrays; of whole ones, keys and shape:
// varints, of which the last is whole.
struct Tensor {
  TensorType type = TensorType::none;
  bool present = false;  // its key was in the record
  std::vector<Chunk> values, keys, shape;

  void clear() noexcept;  // as if its key had not been met
  // What is overridden by a later field of the same message must still be well-formed. Throws WireError.
  void override_with(TensorType next);
  std::uint64_t value_bytes() const noexcept;
};

// How many varints a chunk has.
std::uint64_t count_varints(Chunk chunk) noexcept;
std::uint64_t count_varints(const std::vector<Chunk>& chunks) noexcept;
// That each is one of 64 bits. Throws WireError.
void check_varints(std::span<const Chunk> chunks);
// Decode all of them, which the caller has counted. Throw WireError.
void decode_keys(const std::vector<Chunk>& chunks, std::uint64_t* out);
// Gives where the next one goes; `type`: int32 (4 bytes each) or int64_list (8).
std::byte* decode_numbers(TensorType type, Chunk chunk, std::byte* out);
std::vector<std::uint64_t> decode_shape(const std::vector<Chunk>& chunks);
bool is_shape(const std::vector<Chunk>& chunks, std::span<const std::uint64_t> wanted);

// Memory that the walk of one record needs, kept for the next.
struct WalkMemory {
  std::vector<Chunk> values;
};

// Takes one Value, or Feature, apart. Throws WireError.
void gather_value(Chunk value, Tensor& tensor);
void gather_feature(Chunk feature, Tensor& tensor);

// One entry of a map: see walk_message().
template <typename Find, typename Gather>
void walk_entry(Chunk message, bool label, WalkMemory& memory, Find find, Gather gather) {
  Chunk key;
  memory.values.clear();
  for (WireReader entry(message); !entry.done();) {
    const WireReader::Tag tag = entry.tag();
    if (tag.is(1, WireType::bytes)) {
      key = entry.bytes();
    } else if (tag.is(2, WireType::bytes)) {
      memory.values.push_back(entry.bytes());
    } else {
      entry.skip(tag);
    }
  }
  Tensor* tensor = find(label, std::string_view(reinterpret_cast<const char*>(key.data()), key.size()));
  if (tensor == nullptr) {
    return;
  }
  tensor->override_with(TensorType::none);
  tensor->present = true;
  for (const Chunk value : memory.values) {
    gather(value, *tensor);
  }
}

// Goes over a message and calls `find(label, key)` for each entry of its maps: that gives the tensor to gather into, or
// null for one to leave out. As in every protobuf parser the last entry of a key counts. Throws WireError.
template <typename Find>
void walk_message(MessageForm form, Chunk message, WalkMemory& memory, Find find) {
  for (WireReader fields(message); !fields.done();) {
    const WireReader::Tag tag = fields.tag();
    if (form == MessageForm::record && (tag.is(1, WireType::bytes) || tag.is(2, WireType::bytes))) {
      walk_entry(fields.bytes(), tag.field == 2, memory, find, gather_value);
    } else if (form == MessageForm::example && tag.is(1, WireType::bytes)) {
      for (WireReader features(fields.bytes()); !features.done();) {
        const WireReader::Tag inner = features.tag();
        if (inner.is(1, WireType::bytes)) {
          walk_entry(features.bytes(), false, memory, find, gather_feature);
        } else {
          features.skip(inner);
        }
      }
    } else {
      fields.skip(tag);
    }
  }
}

// What one key of the records holds.
struct TensorField {
  bool label = false;  // in the map `label`, else in `features`
  std::string key;
  TensorType type = TensorType::none;
  Field field;
  std::uint64_t values = 0;  // of a dense record: the product of the shape
};

// The schema that a message has, in the order of its keys. Throws WireError, and std::invalid_argument: what is wrong.
std::vector<TensorField> infer_fields(MessageForm form, Chunk message);
// The schema that the user gives. Of Records: names with the prefix "label_" are of the map `label`; float32, float64
// and int32 are fixed, sparse, or ragged (dense, of any length), uint8 is ragged, of Bytes. Of Examples: float32,
// int64, and uint8, the same but for sparse. Throws std::invalid_argument.
std::vector<TensorField> declare_fields(MessageForm form, const std::vector<Field>& fields);

}  // namespace launcher::data

#endif
