// A stream of records: however its bytes are cut into pieces, a framer finds the same records, inside of them.
#include <algorithm>
#include <functional>
#include <memory>

#include "../fuzz.h"
#include "encode.h"
#include "framing.h"

using namespace launcher;
using fuzz::require;

namespace {

struct Result {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> records;
  std::string error;
};

// `pieces`: how many bytes come at a time, from one call to the next.
Result read(data::Framer& framer, std::span<const std::byte> stream, const std::function<std::size_t()>& pieces) {
  const std::string file = "stream";
  Result out;
  std::size_t begin = 0, end = 0;
  try {
    for (;;) {
      const bool last = end == stream.size();
      // A copy of its own: to look past it is an error that the sanitizer sees.
      const std::vector<std::byte> seen(stream.begin() + static_cast<std::ptrdiff_t>(begin),
                                        stream.begin() + static_cast<std::ptrdiff_t>(end));
      const data::Framed found = framer.next(seen, last, {file, begin, out.records.size()});
      if (found.end != 0) {
        require(found.begin < found.end && found.end <= seen.size(), "a record is among the bytes");
        out.records.emplace_back(begin + found.begin, begin + found.end);
        begin += found.end;
      } else if (last) {
        return out;
      } else {
        end = std::min(end + std::max<std::size_t>(pieces(), 1), stream.size());
      }
    }
  } catch (const data::DataError& error) {
    require(error.offset() <= stream.size(), "an error is inside the stream");
    out.error = error.what();
  }
  return out;
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  std::string recordio, tfrecord;
  for (const std::string& payload : {std::string("first"), std::string(), std::string(200, 'x')}) {
    data::append_recordio(recordio, std::as_bytes(std::span(payload)), true);
    data::append_tfrecord(tfrecord, std::as_bytes(std::span(payload)));
  }
  return {std::string(1, '\0') + recordio,
          std::string(1, '\1') + recordio + recordio,
          std::string(1, '\2') + tfrecord,
          std::string(1, '\3') + "aaaabbbb",
          "\4\xEF\xBB\xBF"
          "a,b\r\n\n1,\"2\n\"\"\"\n",
          "\5# one\n1 2:3\n 4 # x\n"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size == 0 || size > 4096) {
    return 0;
  }
  const auto make = [kind = bytes[0] % 6]() -> std::unique_ptr<data::Framer> {
    switch (kind) {
      case 0:
        return data::recordio_framer();
      case 1:
        return data::recordio_framer(2);
      case 2:
        return data::tfrecord_framer();
      case 3:
        return data::fixed_framer(4);
      case 4:
        return data::line_framer({.quote = '"', .delimiter = ','}, true);
      default:
        return data::line_framer({.comment = '#'}, false);
    }
  };
  const auto stream = std::as_bytes(std::span(bytes, size)).subspan(1);
  const Result whole = read(*make(), stream, [&] { return stream.size(); });
  std::size_t state = size;
  const Result cut = read(*make(), stream, [&] { return (state = state * 31 + bytes[state % size]) % 40; });
  // Damage may be seen before more bytes come, or after: what is there before it is the same.
  const std::size_t common = std::min(whole.records.size(), cut.records.size());
  require(std::equal(whole.records.begin(), whole.records.begin() + static_cast<std::ptrdiff_t>(common),
                     cut.records.begin()),
          "the same records");
  require(whole.error.empty() == cut.error.empty(), "damage is seen in any case");
  require(!whole.error.empty() || whole.records.size() == cut.records.size(), "as many records");
  return 0;
}
