// TFRecord files: records of any content behind a length, each with a sum of its bytes.
//
// A record is uint64 length, uint32 masked CRC-32C of these 8 bytes, the bytes, uint32 masked CRC-32C of them; all
// little-endian. Source: TensorFlow's guide, "TFRecord and tf.train.Example".
#ifndef LAUNCHER_DATA_TFRECORD_H
#define LAUNCHER_DATA_TFRECORD_H

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "batch.h"
#include "index.h"

namespace launcher::data {

inline constexpr std::size_t kTfHeaderBytes = 12;  // length and its sum
inline constexpr std::size_t kTfFooterBytes = 4;

// Finds the records of a file; the sums of the lengths are checked, those of the data when a record is read. `skip`:
// damaged places are left out and noted in the index; reading goes on at the next place from which on three records
// follow each other, or all to the end of the file. Throws DataError: truncated, malformed.
FileIndex scan_tfrecord(const File& file, bool skip);

// One field: data, ragged uint8.
class TfRecordCodec {
 public:
  struct State {};

  explicit TfRecordCodec(bool check_sums);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  bool check_sums_;
  std::vector<Field> fields_;
};

// The bytes of a record with its frame. Throws DataError: changed, malformed (a sum is wrong).
std::span<const std::byte> tfrecord_data(std::span<const std::byte> record, const Place& place, const File& file,
                                         bool check_sums);

}  // namespace launcher::data

#endif
