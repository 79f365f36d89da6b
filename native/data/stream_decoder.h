// Takes the records of a stream apart: a codec (indexed_source.h) whose type its user need not know.
#ifndef LAUNCHER_DATA_STREAM_DECODER_H
#define LAUNCHER_DATA_STREAM_DECODER_H

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "batch.h"
#include "file.h"
#include "index.h"

namespace launcher::data {

class StreamDecoder {
 public:
  StreamDecoder() = default;
  StreamDecoder(const StreamDecoder&) = delete;
  StreamDecoder& operator=(const StreamDecoder&) = delete;
  virtual ~StreamDecoder() = default;
  virtual const std::vector<Field>& fields() const noexcept = 0;
  // As a codec's; by one thread at a time. `stream` has a name and nothing else.
  virtual void decode(std::span<const std::byte> record, const Place& place, const File& stream, std::size_t row,
                      Batch& batch) = 0;
};

template <typename Codec>
class CodecDecoder final : public StreamDecoder {
 public:
  explicit CodecDecoder(Codec codec) : codec_(std::move(codec)) {}
  const std::vector<Field>& fields() const noexcept override { return codec_.fields(); }
  void decode(std::span<const std::byte> record, const Place& place, const File& stream, std::size_t row,
              Batch& batch) override {
    codec_.decode(record, place, stream, row, batch, state_);
  }

 private:
  Codec codec_;
  typename Codec::State state_;
};

template <typename Codec>
std::shared_ptr<StreamDecoder> stream_decoder(Codec codec) {
  return std::make_shared<CodecDecoder<Codec>>(std::move(codec));
}

}  // namespace launcher::data

#endif
