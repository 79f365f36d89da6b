// Codecs (indexed_source.h) of what comes through a pipe only, or is simpler there.
#ifndef LAUNCHER_DATA_STREAM_CODECS_H
#define LAUNCHER_DATA_STREAM_CODECS_H

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "batch.h"
#include "file.h"
#include "index.h"
#include "recordio.h"

namespace launcher::data {

// Each sample is a RecordIO record for each attribute, in their order: what an augmented manifest becomes. A ragged
// field of uint8 takes the payload as it is, a scalar of float32, float64 or int64 the number that it is the text of.
class AttributesCodec {
 public:
  struct State {
    Buffer memory;
  };

  // Dialect::automatic: plain where the record proves it, else dmlc. Throws std::invalid_argument.
  AttributesCodec(std::vector<Field> fields, Dialect dialect);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  std::vector<Field> fields_;
  Dialect dialect_;
};

// Fields at fixed places of a record of a fixed size.
class FixedCodec {
 public:
  struct State {};

  // `offsets`: of each field in the record. Throws std::invalid_argument: a field is not inside it.
  FixedCodec(std::vector<Field> fields, const std::vector<std::size_t>& offsets, std::size_t stride);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  struct Piece {
    std::size_t offset, bytes;
  };
  std::vector<Field> fields_;
  std::vector<Piece> pieces_;  // as the fields
  std::size_t stride_;
};

}  // namespace launcher::data

#endif
