#include "example_codec.h"

#include <utility>

#include "tfrecord.h"

namespace launcher::data {
namespace {

RecordProtoCodec::Origin origin_of(const Place& place, const File& file) {
  return {file.path(), place.offset, place.number, place.offset + kTfHeaderBytes};
}

}  // namespace

ExampleCodec::ExampleCodec(RecordSchema schema, const std::vector<std::size_t>& columns, bool check_sums)
    : messages_(std::move(schema), columns, Dialects(Dialect::plain, 0)), check_sums_(check_sums) {}

void ExampleCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                          Batch& batch, State& state) const {
  messages_.decode_payload(tfrecord_data(record, place, file, check_sums_), origin_of(place, file), row, batch, state);
}

RecordSchema infer_example_schema(const Index& index) {
  Buffer memory;
  const auto record = first_record(index, memory);
  const Place place = index.place(0);
  const File& file = *index.files()[place.file];
  return infer_schema(MessageForm::example, tfrecord_data(record, place, file, true), origin_of(place, file));
}

}  // namespace launcher::data
