// The other way round: records and their frames, for writers.
#ifndef LAUNCHER_DATA_ENCODE_H
#define LAUNCHER_DATA_ENCODE_H

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "record_proto.h"

namespace launcher::data {

// Appends one record. `escape`: split where the payload has the magic at a multiple of 4 (Dialect::dmlc), so that
// readers that begin in the middle of a file find no false header. Throws std::invalid_argument: a part of 512 MiB.
void append_recordio(std::string& out, std::span<const std::byte> payload, bool escape);
void append_tfrecord(std::string& out, std::span<const std::byte> data);

// One key of some records: as a Column of a Batch has it, read only.
struct EncodedColumn {
  TensorField field;
  const std::byte* values = nullptr;  // int32 as such
  const std::uint64_t* keys = nullptr;
  const std::int64_t* offsets = nullptr;  // sparse and ragged
};

// Appends the Record messages of the rows `begin` .. `end`, each in a frame. Dense tensors of one dimension get no
// shape, as SageMaker's own writers have it. Throws std::invalid_argument.
void append_records(std::string& out, const std::vector<EncodedColumn>& columns, std::size_t begin, std::size_t end,
                    bool escape);

}  // namespace launcher::data

#endif
