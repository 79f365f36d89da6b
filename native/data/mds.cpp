#include "mds.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "near.h"
#include "window.h"

namespace launcher::data {
namespace {

static_assert(std::endian::native == std::endian::little, "values are copied as they are");

constexpr std::uint64_t kWord = sizeof(std::uint32_t);
constexpr std::uint64_t kLongestHeader = std::uint64_t{64} << 20;

std::uint32_t word_at(std::span<const std::byte> bytes, std::uint64_t at) {
  std::uint32_t word;
  std::memcpy(&word, bytes.data() + at, sizeof word);
  return word;
}

std::uint64_t table_bytes(std::uint64_t samples) { return kWord * (samples + 2); }

std::uint64_t samples_of(std::span<const std::byte> table, std::uint64_t size, const std::string& path) {
  if (size < table_bytes(0) || table.size() < kWord) {
    throw DataError(Problem::truncated, path, 0, kNowhere,
                    "a shard of " + std::to_string(size) + " bytes; the smallest has 8; copy it again");
  }
  const std::uint64_t samples = word_at(table, 0);
  if (table_bytes(samples) > size) {
    throw DataError(Problem::truncated, path, size, kNowhere,
                    "the table of " + std::to_string(samples) + " samples needs " +
                        std::to_string(table_bytes(samples)) + " bytes, the file has " + std::to_string(size) +
                        "; it was cut or is no MDS shard");
  }
  return samples;
}

// Reads the head of a file: all of it where the file is mapped.
std::span<const std::byte> head_of(const File& file, std::uint64_t bytes, Buffer& memory) {
  if (!file.mapped()) {
    memory.reserve(static_cast<std::size_t>(bytes), 0);
  }
  return file.view(0, static_cast<std::size_t>(bytes), memory.data());
}

// Where an array begins that has its shape before it: a byte (dimensions << 2 | log2 of the bytes of a size), the
// sizes.
std::span<const std::byte> without_shape(std::span<const std::byte> value, std::size_t item_bytes, std::string& wrong) {
  if (value.empty()) {
    wrong = "an array without a shape";
    return {};
  }
  const unsigned first = std::to_integer<unsigned>(value[0]);
  const unsigned dimensions = first >> 2;
  const std::size_t size_bytes = std::size_t{1} << (first & 3U);
  if (dimensions != 1) {
    wrong = "an array of " + std::to_string(dimensions) +
            " dimensions in a column whose shape varies; only one dimension can be read so: write the column with a "
            "fixed shape (ndarray:dtype:shape), or leave it out of the fields";
    return {};
  }
  if (value.size() < 1 + size_bytes) {
    wrong = "an array whose shape is cut";
    return {};
  }
  std::uint64_t count = 0;
  std::memcpy(&count, value.data() + 1, size_bytes);
  const auto items = value.subspan(1 + size_bytes);
  if (items.size() % item_bytes != 0 || items.size() / item_bytes != count) {
    wrong = "an array of " + std::to_string(count) + " values in " + std::to_string(items.size()) + " bytes";
    return {};
  }
  return items;
}

}  // namespace

FileIndex scan_mds(std::span<const std::byte> table, std::uint64_t size, const std::string& path, bool skip) {
  FileIndex index;
  if (size == 0) {
    return index;
  }
  const std::uint64_t samples = samples_of(table, size, path);
  if (table.size() < table_bytes(samples)) {
    throw std::invalid_argument("scan_mds() needs the whole table");
  }
  std::uint64_t begin = word_at(table, kWord);
  if (begin < table_bytes(samples)) {
    throw DataError(Problem::malformed, path, kWord, 0,
                    "the first sample begins at byte " + std::to_string(begin) + ", inside the table of " +
                        std::to_string(table_bytes(samples)) + " bytes; this is no MDS shard");
  }
  const std::uint64_t first = begin;
  for (std::uint64_t i = 0; i < samples; ++i) {
    const std::uint64_t at = kWord * (i + 2);
    const std::uint64_t end = word_at(table, at);
    if (end <= begin) {
      throw DataError(Problem::malformed, path, at, i,
                      "the sample ends at byte " + std::to_string(end) + " and begins at byte " +
                          std::to_string(begin) + " (a shard can not be larger than 4 GiB); write the shard again");
    }
    begin = end;
  }
  const std::uint64_t wanted = begin;
  if (wanted < size) {
    throw DataError(Problem::malformed, path, wanted, kNowhere,
                    std::to_string(size - wanted) + " bytes follow the last sample; copy the shard again");
  }
  if (first > size) {
    throw DataError(Problem::truncated, path, size, kNowhere, "the file ends inside the header; copy the shard again");
  }
  begin = first;
  for (std::uint64_t i = 0; i < samples; ++i) {
    const std::uint64_t end = word_at(table, kWord * (i + 2));
    if (end > size) {
      const std::string text = "the file ends inside the sample: " + std::to_string(end - begin) + " bytes wanted, " +
                               std::to_string(size - std::min(begin, size)) + " there; " + std::to_string(samples - i) +
                               " of " + std::to_string(samples) + " samples are lost; copy the shard again";
      if (!skip) {
        throw DataError(Problem::truncated, path, begin, i, text);
      }
      index.add_damage({begin, size - begin, text});
      break;
    }
    index.add(begin, end - begin);
    begin = end;
  }
  return index;
}

FileIndex scan_mds(const File& file, bool skip) {
  return read_checked(file, [&] {
    Buffer memory;
    const std::uint64_t samples =
        file.size() == 0 ? 0
                         : samples_of(head_of(file, std::min(file.size(), kWord), memory), file.size(), file.path());
    const auto table = head_of(file, std::min(file.size(), table_bytes(samples)), memory);
    return scan_mds(table, file.size(), file.path(), skip);
  });
}

std::string mds_header(const File& file) {
  Buffer memory;
  const std::uint64_t samples =
      samples_of(head_of(file, std::min(file.size(), kWord), memory), file.size(), file.path());
  const std::uint64_t begin = table_bytes(samples);
  const std::uint64_t end = word_at(head_of(file, table_bytes(0), memory), kWord);
  if (end < begin || end > file.size() || end - begin > kLongestHeader) {
    throw DataError(Problem::malformed, file.path(), kWord, kNowhere,
                    "the header would be from byte " + std::to_string(begin) + " to byte " + std::to_string(end) +
                        " of " + std::to_string(file.size()) + "; this is no MDS shard, or it was cut");
  }
  memory.reserve(static_cast<std::size_t>(end - begin), 0);
  const auto text = file.view(begin, static_cast<std::size_t>(end - begin), memory.data());
  return {reinterpret_cast<const char*>(text.data()), text.size()};
}

MdsCodec::MdsCodec(std::vector<MdsColumn> columns) : columns_(std::move(columns)) {
  for (const MdsColumn& column : columns_) {
    const Field& field = column.field;
    if (!column.wanted) {
      continue;
    }
    if (field.kind == Kind::sparse ||
        (field.kind == Kind::fixed && column.bytes != field.values() * size_of(field.dtype))) {
      throw std::invalid_argument("column " + field.name + " has " + std::to_string(column.bytes) +
                                  " bytes in each sample, which its field has not");
    }
    fields_.push_back(field);
  }
}

void MdsCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                      Batch& batch, State& state) const {
  const auto fail = [&](Problem problem, const std::string& text) {
    throw DataError(problem, file.path(), place.offset, place.number, text);
  };
  std::uint64_t sizes = 0;  // bytes of the words before the values
  for (const MdsColumn& column : columns_) {
    sizes += column.bytes == 0 ? kWord : 0;
  }
  if (record.size() < sizes) {
    fail(Problem::malformed, "a sample of " + std::to_string(record.size()) + " bytes, too few for the sizes of its " +
                                 std::to_string(columns_.size()) + " columns");
  }
  state.values.clear();
  std::uint64_t word = 0;
  std::uint64_t at = sizes;
  for (const MdsColumn& column : columns_) {
    std::uint64_t bytes = column.bytes;
    if (bytes == 0) {
      bytes = word_at(record, word);
      word += kWord;
    }
    if (bytes > record.size() - at) {
      fail(Problem::malformed, "column \"" + column.field.name + "\" has " + std::to_string(bytes) +
                                   " bytes, of the sample " + std::to_string(record.size() - at) + " are left");
    }
    auto value = record.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(bytes));
    at += bytes;
    if (!column.wanted) {
      continue;
    }
    const std::size_t item = size_of(column.field.dtype);
    if (column.coding == MdsCoding::shaped) {
      std::string wrong;
      value = without_shape(value, item, wrong);
      if (!wrong.empty()) {
        fail(Problem::mismatch, "column \"" + column.field.name + "\": " + wrong);
      }
    } else if (value.size() % item != 0) {
      fail(Problem::mismatch, "column \"" + column.field.name + "\" has " + std::to_string(bytes) +
                                  " bytes, no whole number of values of " + std::to_string(item));
    }
    state.values.push_back(value);
  }
  if (at != record.size()) {
    fail(Problem::malformed, std::to_string(record.size() - at) + " bytes are left behind the sample's last column");
  }
  for (std::size_t i = 0; i < fields_.size(); ++i) {
    const auto value = state.values[i];
    const std::size_t item = size_of(fields_[i].dtype);
    Column& column = batch.columns[i];
    const bool fixed = fields_[i].kind == Kind::fixed;
    std::byte* to = fixed ? column.values.data() + row * value.size() : append(column, row, value.size() / item, item);
    copy_near(to, value.data(), value.size());
    if (!fixed) {
      column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(value.size() / item);
    }
  }
}

std::shared_ptr<const Source> mds_source(Index index, std::vector<MdsColumn> columns) {
  return std::make_shared<IndexedSource<MdsCodec>>(std::move(index), MdsCodec(std::move(columns)));
}

}  // namespace launcher::data
