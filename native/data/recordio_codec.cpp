#include "recordio_codec.h"

#include <cstring>
#include <string>
#include <utility>

#include "near.h"

namespace launcher::data {
namespace {

constexpr std::size_t kImageHeaderBytes = 24;  // uint32, float32, uint64, uint64
constexpr std::size_t kLabelOffset = 4, kIdOffset = 8;

std::span<const std::byte> payload_at(std::span<const std::byte> record, const Place& place, const File& file,
                                      const Dialects& dialects, Buffer& joined) {
  const auto length = single_frame(record);
  if (length && record.size() - kFrameHeaderBytes - *length < 4) {
    return record.subspan(kFrameHeaderBytes, *length);
  }
  const Frames frames = indexed_frames(record, place, file);
  return payload_of(record, frames, dialects.of(frames, place.file, file), joined);
}

std::uint32_t flag_of(std::span<const std::byte> payload, const Place& place, const File& file) {
  if (payload.size() < kImageHeaderBytes) {
    throw DataError(Problem::mismatch, file.path(), place.offset, place.number,
                    "found a record of " + std::to_string(payload.size()) + " bytes, wanted the " +
                        std::to_string(kImageHeaderBytes) + " of an image record's header at least; read it as bytes");
  }
  std::uint32_t flag;
  std::memcpy(&flag, payload.data(), sizeof(flag));
  if (flag > (payload.size() - kImageHeaderBytes) / sizeof(float)) {
    throw DataError(Problem::mismatch, file.path(), place.offset, place.number,
                    "the image record's header tells of " + std::to_string(flag) + " labels, found " +
                        std::to_string(payload.size() - kImageHeaderBytes) + " bytes after it; read it as bytes");
  }
  return flag;
}

}  // namespace

RecordCodec::RecordCodec(Dialects dialects)
    : dialects_(std::move(dialects)), fields_{{"data", Kind::ragged, DType::uint8, {}}} {}

RecordCodec::RecordCodec(Dialects dialects, std::uint32_t labels)
    : dialects_(std::move(dialects)),
      image_(true),
      labels_(labels),
      fields_{{"label", Kind::fixed, DType::float32, {}},
              {"id", Kind::fixed, DType::uint64, {}},
              {"data", Kind::ragged, DType::uint8, {}}} {
  if (labels != 0) {
    fields_[0].shape = {labels};
  }
}

void RecordCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                         Batch& batch, State& state) const {
  std::span<const std::byte> payload = payload_at(record, place, file, dialects_, state.joined);
  if (image_) {
    payload = take_header(payload, place, file, row, batch);
  }
  Column& column = batch.columns.back();
  std::byte* out = append(column, row, payload.size(), 1);
  copy_near(out, payload.data(), payload.size());
  column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(payload.size());
}

std::span<const std::byte> RecordCodec::take_header(std::span<const std::byte> payload, const Place& place,
                                                    const File& file, std::size_t row, Batch& batch) const {
  const std::uint32_t flag = flag_of(payload, place, file);
  if (flag != labels_) {
    throw DataError(Problem::mismatch, file.path(), place.offset, place.number,
                    "found an image record with " + std::to_string(flag) + " labels after its header, wanted " +
                        std::to_string(labels_) + " as in the first record");
  }
  const std::size_t count = labels_ == 0 ? 1 : labels_;
  const std::byte* labels = payload.data() + (labels_ == 0 ? kLabelOffset : kImageHeaderBytes);
  std::memcpy(batch.columns[0].fixed_row<float>(row, count), labels, count * sizeof(float));
  std::memcpy(batch.columns[1].fixed_row<std::uint64_t>(row, 1), payload.data() + kIdOffset, sizeof(std::uint64_t));
  return payload.subspan(kImageHeaderBytes + labels_ * sizeof(float));
}

std::uint32_t image_labels(const Index& index, Dialect dialect) {
  if (index.records() == 0) {
    throw DataError(Problem::mismatch, index.files().empty() ? "channel" : index.files()[0]->path(), kNowhere, kNowhere,
                    "there is no record to tell how many labels an image record has; read it as bytes");
  }
  const Place place = index.place(0);
  const File& file = *index.files()[place.file];
  Buffer memory(file.mapped() ? 0 : place.bytes), joined;
  const auto record = file.view(place.offset, place.bytes, memory.data());
  return flag_of(payload_at(record, place, file, Dialects(dialect, index.files().size()), joined), place, file);
}

}  // namespace launcher::data
