// Record and Example messages: whatever comes before a message, it is decoded to the same, or refused. The input is two
// messages, behind a byte that says where the second begins.
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "../fuzz.h"
#include "encode.h"
#include "record_proto_codec.h"
#include "recordio.h"

using namespace launcher;
using fuzz::require;

namespace {

std::optional<std::vector<data::TensorField>> infer(data::MessageForm form, data::Chunk message) {
  try {
    return data::infer_fields(form, message);
  } catch (const data::WireError& error) {
    require(error.where >= message.data() && error.where <= message.data() + message.size(), "an error has a place");
  } catch (const std::invalid_argument&) {
  }
  return {};
}

// Every column of the row, as bytes; none: the message was refused.
std::optional<std::string> decode(const data::RecordProtoCodec& codec, data::Chunk message,
                                  data::RecordProtoCodec::State& state, data::Batch& batch) {
  const std::string name = "fuzz";
  try {
    codec.decode_payload(message, {name, 0, 0, 0}, 0, batch, state);
  } catch (const data::DataError& error) {
    require(error.offset() <= message.size(), "an error has a place");
    return {};
  }
  std::string out;
  for (std::size_t i = 0; i < codec.fields().size(); ++i) {
    const data::Field& field = codec.fields()[i];
    data::Column& column = batch.columns[i];
    const bool fixed = field.kind == data::Kind::fixed;
    const std::uint64_t count = fixed ? field.values() : static_cast<std::uint64_t>(column.offsets[1]);
    const auto add = [&](data::Buffer& buffer, std::size_t bytes) {
      require(bytes <= buffer.capacity(), "values are in their memory");
      out.append(reinterpret_cast<const char*>(buffer.data()), bytes);
    };
    add(column.values, static_cast<std::size_t>(count) * data::size_of(field.dtype));
    if (field.kind == data::Kind::sparse) {
      add(column.keys, static_cast<std::size_t>(count) * sizeof(std::uint64_t));
    }
  }
  return out;
}

void check(data::MessageForm form, data::Chunk first, data::Chunk second) {
  const auto fields = infer(form, first);
  if (!fields) {
    return;
  }
  std::vector<std::size_t> columns;
  for (std::size_t i = 0; i < fields->size(); ++i) {
    columns.push_back(i);
  }
  for (const bool complete : {true, false}) {
    if (!complete) {
      columns.resize(columns.size() / 2);  // the others are checked, and not given
    }
    const data::RecordProtoCodec codec({form, *fields, complete}, columns, data::Dialects(data::Dialect::plain, 0));
    data::Batch batch(codec.fields(), 1);
    data::RecordProtoCodec::State fresh, again;
    const auto alone = decode(codec, second, fresh, batch);
    const auto walked = decode(codec, first, again, batch);
    require(decode(codec, first, again, batch) == walked, "a message is the same a second time");
    require(decode(codec, second, again, batch) == alone, "a message is the same after another one");
  }
}

std::string framed(char number, const std::string& inner) {
  return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(inner.size())} + inner;
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  const std::vector<float> values{1, 2, 3, 4};
  const std::vector<std::int32_t> labels{-5, 300};
  const std::vector<std::uint64_t> keys{3, 900, 7, 1};
  const std::vector<std::int64_t> offsets{0, 3, 4};
  const auto bytes = [](const auto& array) { return std::as_bytes(std::span(array)).data(); };
  using data::DType, data::Kind;
  const auto fields = data::declare_fields(data::MessageForm::record, {{"values", Kind::fixed, DType::float32, {2}},
                                                                       {"label_values", Kind::fixed, DType::int32, {}},
                                                                       {"row", Kind::sparse, DType::float32, {10, 100}},
                                                                       {"image", Kind::ragged, DType::uint8, {}}});
  const std::vector<std::vector<data::EncodedColumn>> sets{
      {{fields[0], bytes(values)}, {fields[1], bytes(labels)}},
      {{fields[2], bytes(values), keys.data(), offsets.data()}, {fields[1], bytes(labels)}},
      {{fields[3], bytes(values), nullptr, offsets.data()}}};
  std::vector<std::string> out;
  for (const auto& columns : sets) {
    std::string messages[2];
    for (std::size_t row = 0; row < 2; ++row) {
      std::string framed;
      data::append_records(framed, columns, row, row + 1, false);
      const auto length = data::single_frame(std::as_bytes(std::span(framed)));
      messages[row] = framed.substr(data::kFrameHeaderBytes, *length);
    }
    out.push_back(static_cast<char>(messages[0].size()) + messages[0] + messages[1]);
  }
  std::string example;
  for (const std::string& feature :
       {framed(1, framed(1, "abc")), framed(2, framed(1, "12345678")), framed(3, framed(1, "\1\2"))}) {
    example += framed(1, framed(1, feature.substr(0, 1)) + framed(2, feature));
  }
  example = framed(1, example);
  out.push_back(static_cast<char>(example.size()) + example + example);
  return out;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size == 0) {
    return 0;
  }
  const std::size_t cut = std::min<std::size_t>(bytes[0], size - 1);
  // Each in memory of its own, so that nothing is read past its end.
  const std::vector<std::byte> first(reinterpret_cast<const std::byte*>(bytes) + 1,
                                     reinterpret_cast<const std::byte*>(bytes) + 1 + cut);
  const std::vector<std::byte> second(reinterpret_cast<const std::byte*>(bytes) + 1 + cut,
                                      reinterpret_cast<const std::byte*>(bytes) + size);
  for (const auto form : {data::MessageForm::record, data::MessageForm::example}) {
    check(form, first, second);
  }
  return 0;
}
