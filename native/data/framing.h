// Where the records of a stream end, found as its bytes come.
#ifndef LAUNCHER_DATA_FRAMING_H
#define LAUNCHER_DATA_FRAMING_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "error.h"
#include "lines.h"

namespace launcher::data {

// Where the bytes are that a framer looks at, for its errors.
struct Spot {
  const std::string& file;
  std::uint64_t offset;
  std::uint64_t record;
};

// A record with its frame is at bytes begin .. end; what is before it is none.
struct Framed {
  std::size_t begin = 0, end = 0;
};

class Framer {
 public:
  Framer() = default;
  Framer(const Framer&) = delete;
  Framer& operator=(const Framer&) = delete;
  virtual ~Framer() = default;
  // The first record among `bytes`, which go on where the last one ended. Without an end: it is not whole yet; then the
  // next call has the same begin and more bytes. `last`: no more will come. Throws DataError: truncated, malformed.
  virtual Framed next(std::span<const std::byte> bytes, bool last, const Spot& spot) = 0;
  // What stood before the first record and says what is in it.
  virtual std::string heading() const { return {}; }
};

// RecordIO of either dialect, without joining the parts of a record. A sample is `group` records.
std::unique_ptr<Framer> recordio_framer(std::size_t group = 1);
std::unique_ptr<Framer> tfrecord_framer();
std::unique_ptr<Framer> fixed_framer(std::size_t stride);
// Lines with their line ends, by the rules that files have too. `header`: the first one is no record, nor is another
// like it, for each object of a channel may begin with its own.
std::unique_ptr<Framer> line_framer(const LineRules& rules, bool header);

}  // namespace launcher::data

#endif
