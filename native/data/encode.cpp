#include "encode.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "crc32c.h"
#include "recordio.h"

namespace launcher::data {
namespace {

using Bytes = std::span<const std::byte>;

void append(std::string& out, Bytes bytes) { out.append(reinterpret_cast<const char*>(bytes.data()), bytes.size()); }

template <typename Word>
void append_word(std::string& out, Word word) {
  append(out, std::as_bytes(std::span(&word, 1)));
}

void append_part(std::string& out, std::uint32_t flag, Bytes part) {
  if (part.size() > kMaxPartBytes) {
    throw std::invalid_argument("a record of " + std::to_string(part.size()) + " bytes: RecordIO has less than " +
                                std::to_string(std::uint64_t{kMaxPartBytes} + 1) + " in one frame");
  }
  append_word(out, kRecordMagic);
  append_word(out, flag << 29 | static_cast<std::uint32_t>(part.size()));
  append(out, part);
  out.append((4 - part.size() % 4) % 4, '\0');
}

// Where `payload` has the magic at a multiple of 4, from `from` on; its size where it has not.
std::size_t find_magic(Bytes payload, std::size_t from) {
  while (from < payload.size()) {
    const void* found = memmem(payload.data() + from, payload.size() - from, &kRecordMagic, sizeof(kRecordMagic));
    if (found == nullptr) {
      break;
    }
    from = static_cast<std::size_t>(static_cast<const std::byte*>(found) - payload.data());
    if (from % sizeof(kRecordMagic) == 0) {
      return from;
    }
    ++from;
  }
  return payload.size();
}

void append_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) {
    out.push_back(static_cast<char>(value | 0x80));
  }
  out.push_back(static_cast<char>(value));
}

void append_field(std::string& out, std::uint32_t field, Bytes bytes) {
  append_varint(out, field << 3 | static_cast<std::uint32_t>(WireType::bytes));
  append_varint(out, bytes.size());
  append(out, bytes);
}

Bytes bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

void append_packed(std::string& out, std::uint32_t field, const std::uint64_t* numbers, std::size_t count,
                   std::string& memory) {
  memory.clear();
  for (std::size_t i = 0; i < count; ++i) {
    append_varint(memory, numbers[i]);
  }
  append_field(out, field, bytes_of(memory));
}

// Messages are nested and begin with their length: each is made in memory of its own, from the innermost out.
class Encoder {
 public:
  void append_record(std::string& out, const std::vector<EncodedColumn>& columns, std::size_t row, bool escape) {
    record_.clear();
    for (const EncodedColumn& column : columns) {
      tensor_.clear();
      make_tensor(column, row);
      value_.clear();
      append_field(value_, static_cast<std::uint32_t>(column.field.type), bytes_of(tensor_));
      entry_.clear();
      append_field(entry_, 1, bytes_of(column.field.key));
      append_field(entry_, 2, bytes_of(value_));
      append_field(record_, column.field.label ? 2 : 1, bytes_of(entry_));
    }
    append_recordio(out, bytes_of(record_), escape);
  }

 private:
  void make_tensor(const EncodedColumn& column, std::size_t row) {
    const Field& field = column.field.field;
    const bool fixed = field.kind == Kind::fixed;
    const auto begin = fixed ? row * column.field.values : static_cast<std::uint64_t>(column.offsets[row]);
    const auto count = fixed ? column.field.values : static_cast<std::uint64_t>(column.offsets[row + 1]) - begin;
    const std::size_t size = size_of(field.dtype);
    if (column.field.type == TensorType::int32) {
      packed_.clear();
      for (std::uint64_t i = begin; i < begin + count; ++i) {
        std::int32_t value;
        std::memcpy(&value, column.values + i * size, size);
        append_varint(packed_, static_cast<std::uint64_t>(std::int64_t{value}));
      }
      append_field(tensor_, 1, bytes_of(packed_));
    } else {
      append_field(tensor_, 1, {column.values + begin * size, static_cast<std::size_t>(count * size)});
    }
    if (field.kind == Kind::sparse) {
      append_packed(tensor_, 2, column.keys + begin, static_cast<std::size_t>(count), packed_);
    }
    if (field.kind == Kind::sparse || field.shape.size() > 1) {
      append_packed(tensor_, 3, field.shape.data(), field.shape.size(), packed_);
    }
  }

  std::string record_, entry_, value_, tensor_, packed_;
};

}  // namespace

void append_recordio(std::string& out, std::span<const std::byte> payload, bool escape) {
  std::size_t begin = 0;
  std::size_t found = escape ? find_magic(payload, 0) : payload.size();
  std::uint32_t flag = 0;
  for (; found < payload.size(); found = find_magic(payload, begin)) {
    append_part(out, begin == 0 ? 1 : 2, payload.subspan(begin, found - begin));
    begin = found + sizeof(kRecordMagic);
    flag = 3;
  }
  append_part(out, flag, payload.subspan(begin));
}

void append_tfrecord(std::string& out, std::span<const std::byte> data) {
  const std::uint64_t length = data.size();
  append_word(out, length);
  append_word(out, mask_crc(crc32c(std::as_bytes(std::span(&length, 1)))));
  append(out, data);
  append_word(out, mask_crc(crc32c(data)));
}

void append_records(std::string& out, const std::vector<EncodedColumn>& columns, std::size_t begin, std::size_t end,
                    bool escape) {
  Encoder encoder;
  for (std::size_t row = begin; row < end; ++row) {
    encoder.append_record(out, columns, row, escape);
  }
}

}  // namespace launcher::data
