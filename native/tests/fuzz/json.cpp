// JSON: one text after the other is taken or refused, and a record is what its own fields say.
#include "json.h"

#include <cstring>

#include "../fuzz.h"
#include "lines.h"

using namespace launcher;
using fuzz::require;

namespace {

// Whether it is JSON. What is skipped is skipped again as the same.
bool is_json(std::string_view text) {
  try {
    data::JsonCursor cursor(text);
    const std::string_view value = cursor.skip();
    cursor.finish();
    data::JsonCursor again(value);
    require(again.skip() == value && again.left() == 0, "a value ends where it ends");
    return true;
  } catch (const data::JsonError& error) {
    require(error.malformed() && error.offset() <= text.size(), "an error is in the text");
    return false;
  }
}

void check_record(std::string_view line, const data::File& file) {
  std::vector<data::Field> fields;
  try {
    fields = data::json_fields(line, {});
  } catch (const data::JsonError& error) {
    require(!error.malformed() || !is_json(line) || data::JsonCursor(line).kind() != data::JsonKind::object,
            "what is malformed is no JSON object");
    return;
  }
  require(is_json(line), "a record is JSON");
  for (const data::Field& field : fields) {
    if (field.values() > 1 << 20) {
      return;
    }
  }
  const data::JsonCodec codec(fields);
  data::Batch batch(codec.fields(), 1);
  data::JsonCodec::State state;
  codec.decode(std::as_bytes(std::span(line)), {0, 0, line.size(), 0}, file, 0, batch, state);
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  return {R"({"a": 1, "b": -2.5e3, "c": true, "d": "x\u00e9\ud83d\ude00\n", "e": [1, 2.5], "f": [[1, 2], [3, 4]]})",
          "{\"a\":[0]}\n\n{\"a\":[-0]} x\n{\"a\":[null]}", R"({"x": {"y": [1, {"z": "]}"}, null]}, "w": ""})",
          "[[[[[[1]]]]]]"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const std::uint8_t nothing[] = {'\n'};
  static const fuzz::MemoryFile memory(nothing, 1);  // for messages
  static const auto file = memory.open(data::Access::mapped);
  const std::string_view content(reinterpret_cast<const char*>(bytes), size);
  is_json(content);
  data::LineFramer framer({});
  const auto check = [&](std::uint64_t begin, std::uint64_t end) {
    const std::string copy(data::without_line_end(content.substr(begin, end - begin)));
    check_record(copy, *file);
  };
  framer.feed(content, check);
  framer.finish(check);
  return 0;
}
