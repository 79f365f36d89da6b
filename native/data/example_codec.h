// Takes `Example` messages in TFRecord files apart into columns.
#ifndef LAUNCHER_DATA_EXAMPLE_CODEC_H
#define LAUNCHER_DATA_EXAMPLE_CODEC_H

#include <cstddef>
#include <span>
#include <vector>

#include "record_proto_codec.h"

namespace launcher::data {

class ExampleCodec {
 public:
  using State = RecordProtoCodec::State;

  // See RecordProtoCodec, and tfrecord.h.
  ExampleCodec(RecordSchema schema, const std::vector<std::size_t>& columns, bool check_sums);
  const std::vector<Field>& fields() const noexcept { return messages_.fields(); }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  RecordProtoCodec messages_;
  bool check_sums_;
};

// The schema of the first record of all. Throws DataError, also when there is no record.
RecordSchema infer_example_schema(const Index& index);

}  // namespace launcher::data

#endif
