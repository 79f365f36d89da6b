#include "record_proto.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <stdexcept>
#include <utility>

#include "wire.h"

namespace launcher::data {
namespace {

constexpr std::uint64_t kMaxDense = std::uint64_t{1} << 40;  // far above any record, far below any overflow
constexpr std::string_view kLabelPrefix = "label_";

// Of packed varints, the last must be whole; how long each is shows when they are decoded.
Chunk whole_varints(Chunk chunk) {
  if (!chunk.empty() && static_cast<std::uint8_t>(chunk.back()) >= 0x80) {
    throw WireError{chunk.data() + chunk.size() - 1, "a number goes past the end of what it is in"};
  }
  return chunk;
}

Chunk whole_numbers(Chunk chunk, std::size_t size) {
  if (chunk.size() % size != 0) {
    throw WireError{chunk.data(), "packed numbers whose length is no multiple of one number's"};
  }
  return chunk;
}

void gather_varints(WireReader& reader, WireType type, std::vector<Chunk>& chunks) {
  chunks.push_back(type == WireType::bytes ? whole_varints(reader.bytes()) : reader.number(type));
}

void gather_tensor(Chunk message, Tensor& tensor) {
  const WireType single = is_of_varints(tensor.type)           ? WireType::varint
                          : tensor.type == TensorType::float64 ? WireType::fixed64
                                                               : WireType::fixed32;
  const bool has_shape = static_cast<std::uint8_t>(tensor.type) < kFeature;
  const std::size_t size = tensor.type == TensorType::float64 ? 8 : 4;
  for (WireReader reader(message); !reader.done();) {
    const WireReader::Tag tag = reader.tag();
    const bool varints = tag.type == WireType::bytes || tag.type == WireType::varint;
    if (tag.field == 1 && tag.type == WireType::bytes) {
      const Chunk chunk = reader.bytes();
      tensor.values.push_back(single == WireType::varint ? whole_varints(chunk) : whole_numbers(chunk, size));
    } else if (tag.is(1, single)) {
      tensor.values.push_back(reader.number(single));
    } else if (has_shape && tag.field == 2 && varints) {
      gather_varints(reader, tag.type, tensor.keys);
    } else if (has_shape && tag.field == 3 && varints) {
      gather_varints(reader, tag.type, tensor.shape);
    } else {
      reader.skip(tag);
    }
  }
}

void gather_bytes(Chunk message, Tensor& tensor) {
  for (WireReader reader(message); !reader.done();) {
    const WireReader::Tag tag = reader.tag();
    if (tag.is(1, WireType::bytes)) {
      tensor.values.push_back(reader.bytes());
    } else {
      reader.skip(tag);
    }
  }
}

template <typename TypeOf>
void gather_one_of(Chunk message, Tensor& tensor, TypeOf type_of) {
  for (WireReader reader(message); !reader.done();) {
    const WireReader::Tag tag = reader.tag();
    const TensorType type = tag.type == WireType::bytes ? type_of(tag.field) : TensorType::none;
    if (type == TensorType::none) {
      reader.skip(tag);
      continue;
    }
    if (tensor.type != type) {
      tensor.override_with(type);  // one of: the last counts; the same again is merged
    }
    const Chunk inner = reader.bytes();
    if (is_of_bytes(type)) {
      gather_bytes(inner, tensor);
    } else {
      gather_tensor(inner, tensor);
    }
  }
}

std::uint64_t* decode_varints(Chunk chunk, std::uint64_t* out) {
  // Most keys have 1 to 3 bytes, and as many as the one before: branches that are foreseen cost less than counting
  // bits.
  const std::byte* at = chunk.data();
  const std::byte* const end = at + chunk.size();
  while (static_cast<std::size_t>(end - at) >= sizeof(std::uint32_t)) {
    std::uint32_t word;
    std::memcpy(&word, at, sizeof(word));
    if ((word & 0x80) == 0) {
      *out++ = word & 0x7f;
      at += 1;
    } else if ((word & 0x8000) == 0) {
      *out++ = (word & 0x7f) | (word >> 1 & 0x3f80);
      at += 2;
    } else if ((word & 0x800000) == 0) {
      *out++ = (word & 0x7f) | (word >> 1 & 0x3f80) | (word >> 2 & 0x1fc000);
      at += 3;
    } else {
      WireReader reader({at, end});
      *out++ = reader.varint();
      at = reader.at();
    }
  }
  for (WireReader reader({at, end}); !reader.done();) {
    *out++ = reader.varint();
  }
  return out;
}

std::uint64_t product(const std::vector<std::uint64_t>& shape, const std::string& name) {
  std::uint64_t all = 1;
  for (const std::uint64_t size : shape) {
    if (__builtin_mul_overflow(all, size, &all) || all > std::numeric_limits<std::int64_t>::max()) {
      throw std::invalid_argument("field '" + name + "' has a shape of more values than 63 bits count");
    }
  }
  return all;
}

DType dtype_of(TensorType type) {
  switch (type) {
    case TensorType::float64:
      return DType::float64;
    case TensorType::int32:
      return DType::int32;
    case TensorType::int64_list:
      return DType::int64;
    case TensorType::bytes:
    case TensorType::bytes_list:
      return DType::uint8;
    default:
      return DType::float32;
  }
}

bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t at) { return static_cast<std::uint8_t>(text[at]); };
    const std::uint8_t first = byte(i);
    const std::size_t length = first < 0x80   ? 1
                               : first < 0xc2 ? 0
                               : first < 0xe0 ? 2
                               : first < 0xf0 ? 3
                               : first < 0xf5 ? 4
                                              : 0;
    if (length == 0 || text.size() - i < length) {
      return false;
    }
    for (std::size_t k = 1; k < length; ++k) {
      if ((byte(i + k) & 0xc0) != 0x80) {
        return false;
      }
    }
    // Too long for their number, surrogates, and more than U+10FFFF.
    const std::uint8_t second = length > 2 ? byte(i + 1) : 0;
    if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90) ||
        (first == 0xf4 && second > 0x8f)) {
      return false;
    }
    i += length;
  }
  return true;
}

TensorField infer_field(MessageForm form, bool label, const std::string& key, const Tensor& tensor) {
  if (!is_utf8(key)) {
    throw std::invalid_argument("a key is no UTF-8 text; this is no such message, or it is damaged");
  }
  TensorField one;
  one.label = label;
  one.key = key;
  one.type = tensor.type;
  one.field.name = label ? std::string(kLabelPrefix) + key : key;
  one.field.dtype = dtype_of(tensor.type);
  if (tensor.type == TensorType::none) {
    throw std::invalid_argument("field '" + one.field.name + "' has a key and no value; name the fields yourself");
  }
  if (is_of_bytes(tensor.type)) {
    one.field.kind = Kind::ragged;
    return one;
  }
  one.field.shape = decode_shape(tensor.shape);
  const std::uint64_t count =
      is_of_varints(tensor.type) ? count_varints(tensor.values) : tensor.value_bytes() / size_of(one.field.dtype);
  if (form == MessageForm::example && count == 0) {
    one.field.kind = Kind::ragged;  // lists that may be empty have no length of their own
    return one;
  }
  if (count_varints(tensor.keys) != 0 || (count == 0 && !one.field.shape.empty())) {
    one.field.kind = Kind::sparse;
    if (one.field.shape.empty()) {
      throw std::invalid_argument("field '" + one.field.name + "' is sparse (it has keys) and has no shape");
    }
  } else if (one.field.shape.empty()) {
    one.field.shape = {count};
  }
  one.values = product(one.field.shape, one.field.name);
  if (one.field.kind == Kind::fixed && one.values != count) {
    throw std::invalid_argument("field '" + one.field.name + "' has " + std::to_string(count) +
                                " values and a shape of " + std::to_string(one.values));
  }
  return one;
}

TensorType declared_type(MessageForm form, const Field& field) {
  const bool record = form == MessageForm::record;
  if (field.dtype == DType::uint8 && field.kind == Kind::ragged) {
    return record ? TensorType::bytes : TensorType::bytes_list;
  }
  if (!record && field.kind != Kind::sparse && (field.dtype == DType::float32 || field.dtype == DType::int64)) {
    return field.dtype == DType::float32 ? TensorType::float_list : TensorType::int64_list;
  }
  if (record && (field.dtype == DType::float32 || field.dtype == DType::float64 || field.dtype == DType::int32)) {
    return field.dtype == DType::float32   ? TensorType::float32
           : field.dtype == DType::float64 ? TensorType::float64
                                           : TensorType::int32;
  }
  throw std::invalid_argument("field '" + field.name + "': " +
                              (record ? "a Record has float32, float64 and int32, and bytes (ragged uint8)"
                                      : "an Example has float32 and int64, and bytes (ragged uint8)"));
}

void refuse_same_names(const std::vector<TensorField>& fields) {
  for (const TensorField& field : fields) {
    const auto same = [&](const TensorField& other) { return other.field.name == field.field.name; };
    if (std::count_if(fields.begin(), fields.end(), same) != 1) {
      throw std::invalid_argument("there are two fields named '" + field.field.name +
                                  "': labels get the prefix \"label_\", and a feature has such a name already");
    }
  }
}

}  // namespace

const char* name_of(TensorType type) noexcept {
  switch (type) {
    case TensorType::float32:
      return "Float32Tensor";
    case TensorType::float64:
      return "Float64Tensor";
    case TensorType::int32:
      return "Int32Tensor";
    case TensorType::bytes:
      return "Bytes";
    case TensorType::bytes_list:
      return "BytesList";
    case TensorType::float_list:
      return "FloatList";
    case TensorType::int64_list:
      return "Int64List";
    case TensorType::none:
      break;
  }
  return "no value";
}

void Tensor::clear() noexcept {
  type = TensorType::none;
  present = false;
  values.clear();
  keys.clear();
  shape.clear();
}

void Tensor::override_with(TensorType next) {
  if (is_of_varints(type)) {
    check_varints(values);
  }
  check_varints(keys);
  check_varints(shape);
  values.clear();
  keys.clear();
  shape.clear();
  type = next;
}

std::uint64_t Tensor::value_bytes() const noexcept {
  std::uint64_t bytes = 0;
  for (const Chunk chunk : values) {
    bytes += chunk.size();
  }
  return bytes;
}

std::uint64_t count_varints(Chunk chunk) noexcept {
  // Bytes without the upper bit, eight at a time: each byte of `sums` counts those in its place, and the product's
  // upper byte is their sum.
  constexpr std::size_t kWord = sizeof(std::uint64_t);
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  constexpr std::size_t kWords = 31;  // 8 * 31 fits into a byte
  std::uint64_t count = 0;
  while (chunk.size() >= kWord) {
    const std::size_t words = std::min(chunk.size() / kWord, kWords);
    std::uint64_t sums = 0;
    for (std::size_t i = 0; i < words; ++i) {
      std::uint64_t word;
      std::memcpy(&word, chunk.data() + i * kWord, kWord);
      sums += ~word >> 7 & kOnes;
    }
    count += sums * kOnes >> 56;
    chunk = chunk.subspan(words * kWord);
  }
  for (const std::byte byte : chunk) {
    count += static_cast<std::uint64_t>(static_cast<std::uint8_t>(byte) < 0x80);
  }
  return count;
}

std::uint64_t count_varints(const std::vector<Chunk>& chunks) noexcept {
  std::uint64_t count = 0;
  for (const Chunk chunk : chunks) {
    count += count_varints(chunk);
  }
  return count;
}

void check_varints(std::span<const Chunk> chunks) {
  for (const Chunk chunk : chunks) {
    for (WireReader reader(chunk); !reader.done();) {
      reader.varint();
    }
  }
}

void decode_keys(const std::vector<Chunk>& chunks, std::uint64_t* out) {
  for (const Chunk chunk : chunks) {
    out = decode_varints(chunk, out);
  }
}

std::byte* decode_numbers(TensorType type, Chunk chunk, std::byte* out) {
  const std::size_t size = type == TensorType::int32 ? sizeof(std::int32_t) : sizeof(std::int64_t);
  for (WireReader reader(chunk); !reader.done(); out += size) {
    const std::uint64_t value = reader.varint();  // a negative one has 64 bits in either type
    const auto low = static_cast<std::uint32_t>(value);
    std::memcpy(out, size == sizeof(low) ? static_cast<const void*>(&low) : &value, size);
  }
  return out;
}

bool is_shape(const std::vector<Chunk>& chunks, std::span<const std::uint64_t> wanted) {
  std::size_t dimension = 0;
  for (const Chunk chunk : chunks) {
    for (WireReader reader(chunk); !reader.done(); ++dimension) {
      if (const std::uint64_t size = reader.varint(); dimension == wanted.size() || size != wanted[dimension]) {
        return false;
      }
    }
  }
  return dimension == wanted.size();
}

std::vector<std::uint64_t> decode_shape(const std::vector<Chunk>& chunks) {
  std::vector<std::uint64_t> shape(count_varints(chunks));
  decode_keys(chunks, shape.data());
  return shape;
}

void gather_value(Chunk value, Tensor& tensor) {
  gather_one_of(value, tensor, [](std::uint32_t field) {
    return field == 2 || field == 3 || field == 7 || field == 9 ? static_cast<TensorType>(field) : TensorType::none;
  });
}

void gather_feature(Chunk feature, Tensor& tensor) {
  gather_one_of(feature, tensor, [](std::uint32_t field) {
    return field >= 1 && field <= 3 ? static_cast<TensorType>(kFeature + field) : TensorType::none;
  });
}

std::vector<TensorField> infer_fields(MessageForm form, Chunk message) {
  struct Entry {
    bool label;
    std::string key;
    Tensor tensor;
  };
  std::deque<Entry> entries;
  WalkMemory memory;
  walk_message(form, message, memory, [&](bool label, std::string_view key) {
    for (Entry& entry : entries) {
      if (entry.label == label && entry.key == key) {
        return &entry.tensor;
      }
    }
    return &entries.emplace_back(Entry{label, std::string(key), {}}).tensor;
  });
  std::vector<TensorField> fields;
  for (const Entry& entry : entries) {
    fields.push_back(infer_field(form, entry.label, entry.key, entry.tensor));
  }
  if (fields.empty()) {
    throw std::invalid_argument("the message has no field at all");
  }
  // Writers that keep their maps in hash tables write the keys of each record in another order.
  std::sort(fields.begin(), fields.end(), [](const TensorField& left, const TensorField& right) {
    return std::pair(left.label, std::string_view(left.key)) < std::pair(right.label, std::string_view(right.key));
  });
  refuse_same_names(fields);
  return fields;
}

std::vector<TensorField> declare_fields(MessageForm form, const std::vector<Field>& declared) {
  std::vector<TensorField> fields;
  for (const Field& field : declared) {
    TensorField one;
    one.field = field;
    one.label = form == MessageForm::record && field.name.starts_with(kLabelPrefix);
    one.key = one.label ? field.name.substr(kLabelPrefix.size()) : field.name;
    one.type = declared_type(form, field);
    if (field.kind == Kind::sparse && field.shape.empty()) {
      throw std::invalid_argument("field '" + field.name + "' is sparse and has no shape");
    }
    one.values = product(field.shape, field.name);
    if (field.kind == Kind::fixed && one.values > kMaxDense) {
      throw std::invalid_argument("field '" + field.name + "' has a shape of more values than a record can hold");
    }
    fields.push_back(std::move(one));
  }
  refuse_same_names(fields);
  return fields;
}

}  // namespace launcher::data
