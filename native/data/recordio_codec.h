// Gives the payloads of RecordIO frames as bytes; of MXNet's image records also what stands in front of the image.
#ifndef LAUNCHER_DATA_RECORDIO_CODEC_H
#define LAUNCHER_DATA_RECORDIO_CODEC_H

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "recordio.h"

namespace launcher::data {

class RecordCodec {
 public:
  struct State {
    Buffer joined;
  };

  // One field: data, ragged uint8.
  explicit RecordCodec(Dialects dialects);
  // As MXNet's im2rec writes them, IRHeader first (uint32 flag, float32 label, uint64 id, id2; flag > 0: that many
  // float32 labels follow, and count instead of the one). Fields: label (float32; `labels` of each record, 0: the one
  // of the header), id (uint64), data (ragged uint8: what follows).
  RecordCodec(Dialects dialects, std::uint32_t labels);

  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  std::span<const std::byte> take_header(std::span<const std::byte> payload, const Place& place, const File& file,
                                         std::size_t row, Batch& batch) const;

  Dialects dialects_;
  bool image_ = false;
  std::uint32_t labels_ = 0;
  std::vector<Field> fields_;
};

// The flag of the first record's IRHeader. Throws DataError, also when there is no record.
std::uint32_t image_labels(const Index& index, Dialect dialect);

}  // namespace launcher::data

#endif
