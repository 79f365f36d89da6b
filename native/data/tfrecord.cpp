#include "tfrecord.h"

#include <cstring>
#include <string>

#include "crc32c.h"
#include "near.h"
#include "window.h"

namespace launcher::data {
namespace {

constexpr std::uint64_t kAround = kTfHeaderBytes + kTfFooterBytes;
constexpr int kProof = 3;  // records that must follow each other for a header to be taken for one, after damage

std::uint32_t load32(const std::byte* from) noexcept {
  std::uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

std::uint64_t length_of(const std::byte* header) noexcept {
  std::uint64_t length;
  std::memcpy(&length, header, sizeof(length));
  return length;
}

bool header_holds(const std::byte* header) noexcept {
  return load32(header + sizeof(std::uint64_t)) == mask_crc(crc32c({header, sizeof(std::uint64_t)}));
}

// The bytes of the record at `begin` with its frame; 0 where none is.
std::uint64_t record_at(Window& window, std::uint64_t begin) {
  const std::uint64_t available = window.size() - begin;
  if (available < kAround) {
    return 0;
  }
  const std::byte* header = window.at(begin, kTfHeaderBytes).data();
  const std::uint64_t length = length_of(header);
  return length <= available - kAround && header_holds(header) ? length + kAround : 0;
}

bool holds(Window& window, std::uint64_t begin) {
  for (int record = 0; record < kProof && (record == 0 || begin < window.size()); ++record) {
    const std::uint64_t bytes = record_at(window, begin);
    if (bytes == 0) {
      return false;
    }
    begin += bytes;
  }
  return true;
}

std::uint64_t resynchronise(Window& window, std::uint64_t begin) {
  while (window.size() - begin >= kAround) {
    if (holds(window, begin)) {
      return begin;
    }
    ++begin;
  }
  return window.size();
}

DataError error_at(Window& window, const File& file, std::uint64_t begin, std::uint64_t record) {
  const std::uint64_t available = window.size() - begin;
  const std::string cut =
      "; the file was cut, or not copied whole; copy it again, or leave the record out (on_bad=skip)";
  if (available < kTfHeaderBytes) {
    return {Problem::truncated, file.path(), begin, record,
            "truncated header: found " + std::to_string(available) + " bytes to the end of the file, wanted " +
                std::to_string(kTfHeaderBytes) + cut};
  }
  const std::byte* header = window.at(begin, kTfHeaderBytes).data();
  if (!header_holds(header)) {
    return {Problem::malformed, file.path(), begin, record,
            "the sum of the record's length is wrong; this is no TFRecord file (a compressed one must be unpacked), or "
            "it is damaged before or at this place"};
  }
  return {Problem::truncated, file.path(), begin, record,
          "truncated data: the header tells of " + std::to_string(length_of(header)) + " bytes and a sum of " +
              std::to_string(kTfFooterBytes) + ", found " + std::to_string(available - kTfHeaderBytes) +
              " bytes to the end of the file" + cut};
}

FileIndex scan(const File& file, bool skip) {
  FileIndex index;
  Window window(file);
  for (std::uint64_t at = 0; at < file.size();) {
    if (const std::uint64_t bytes = record_at(window, at); bytes != 0) {
      index.add(at, bytes);
      at += bytes;
      continue;
    }
    const DataError error = error_at(window, file, at, index.records());
    if (!skip) {
      throw error;
    }
    const std::uint64_t next = resynchronise(window, at + 1);
    index.add_damage({at, next - at, error.what()});
    at = next;
  }
  return index;
}

}  // namespace

FileIndex scan_tfrecord(const File& file, bool skip) {
  return read_checked(file, [&] { return scan(file, skip); });
}

std::span<const std::byte> tfrecord_data(std::span<const std::byte> record, const Place& place, const File& file,
                                         bool check_sums) {
  if (record.size() < kAround || length_of(record.data()) != record.size() - kAround) {
    throw DataError(Problem::changed, file.path(), place.offset, place.number,
                    "there is another record here than when the file was indexed; the file was changed while it was "
                    "in use, or its index is of another file: remove the index and start again");
  }
  const auto data = record.subspan(kTfHeaderBytes, record.size() - kAround);
  if (check_sums && load32(data.data() + data.size()) != mask_crc(crc32c(data))) {
    throw DataError(Problem::malformed, file.path(), place.offset + kTfHeaderBytes, place.number,
                    "the sum of the record's " + std::to_string(data.size()) +
                        " bytes is wrong: they are not what was written; copy the file again, or leave the record out "
                        "(on_bad=substitute)");
  }
  return data;
}

TfRecordCodec::TfRecordCodec(bool check_sums)
    : check_sums_(check_sums), fields_{{"data", Kind::ragged, DType::uint8, {}}} {}

void TfRecordCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                           Batch& batch, State&) const {
  const auto data = tfrecord_data(record, place, file, check_sums_);
  Column& column = batch.columns.front();
  std::byte* out = append(column, row, data.size(), 1);
  copy_near(out, data.data(), data.size());
  column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(data.size());
}

}  // namespace launcher::data
