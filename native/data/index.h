// Where the records of a channel's files are.
#ifndef LAUNCHER_DATA_INDEX_H
#define LAUNCHER_DATA_INDEX_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "file.h"

namespace launcher::data {

struct Place {
  std::size_t file;
  std::uint64_t offset;  // of the record's first byte (of its frame, if the format has one)
  std::uint64_t bytes;   // with the frame
  std::uint64_t number;  // of the record in its file
};

// What was left out of a file because it is damaged, and why (`on_bad` is skip).
struct Damage {
  std::uint64_t offset;
  std::uint64_t bytes;
  std::string text;
};

// The arrays of a FileIndex, wherever they are.
struct Spans {
  static constexpr std::uint64_t kBlock = 64;  // records with a base in common

  // A base for each block of records, and 32 bits for each record above it. Records that do not fit (a block or a
  // record of more than 4 GiB) make the whole file wide: 64 bits each.
  const std::uint64_t* bases = nullptr;
  const std::uint32_t* deltas = nullptr;
  const std::uint32_t* lengths = nullptr;  // null while each record ends where the next begins
  const std::uint64_t* wide = nullptr;     // offset and bytes of each; then the three above are not used
  std::uint64_t records = 0;
  std::uint64_t end = 0;  // of the last record

  // The n-th record's offset and bytes; number < records.
  std::pair<std::uint64_t, std::uint64_t> at(std::uint64_t number) const noexcept {
    if (wide != nullptr) {
      return {wide[2 * number], wide[2 * number + 1]};
    }
    const std::uint64_t offset = bases[number / kBlock] + deltas[number];
    if (lengths != nullptr) {
      return {offset, lengths[number]};
    }
    const std::uint64_t next = number + 1;
    return {offset, (next < records ? bases[next / kBlock] + deltas[next] : end) - offset};
  }
  [[gnu::always_inline]] void bring_near(std::uint64_t number) const noexcept {  // see near.h
    if (wide != nullptr) {
      __builtin_prefetch(wide + 2 * number);
      return;
    }
    __builtin_prefetch(bases + number / kBlock);
    __builtin_prefetch(deltas + number);
    if (lengths != nullptr) {
      __builtin_prefetch(lengths + number);
    }
  }
};

// The records of one file, in its order, as a scanner finds them, or as a sidecar has them.
class FileIndex {
 public:
  FileIndex() = default;
  // Of arrays in a mapped sidecar, or (null) of a copy of them.
  FileIndex(const Spans& spans, std::shared_ptr<const File> sidecar);

  // Throws std::invalid_argument: the record begins before the end of the one before it, or the file index is a
  // sidecar's.
  void add(std::uint64_t offset, std::uint64_t bytes);
  void add_damage(Damage damage) { damage_.push_back(std::move(damage)); }
  std::uint64_t records() const noexcept { return records_; }
  std::uint64_t end() const noexcept { return end_; }  // of the last record
  const std::vector<Damage>& damage() const noexcept { return damage_; }
  // What the scanner found out beside, in its own words for its own source: kept in the sidecar.
  void set_note(std::string note) { note_ = std::move(note); }
  const std::string& note() const noexcept { return note_; }
  // Throws DataError when pages of the sidecar could not be read (see file.h).
  void check_faults() const {
    if (sidecar_) {
      sidecar_->check_faults();
    }
  }
  // The n-th record's offset and bytes.
  std::pair<std::uint64_t, std::uint64_t> at(std::uint64_t number) const noexcept { return spans().at(number); }
  // Valid until a record is added.
  Spans spans() const noexcept;

 private:
  void add_apart(std::uint64_t offset, std::uint64_t bytes);
  void widen();

  std::vector<std::uint64_t> bases_;
  std::vector<std::uint32_t> deltas_;
  std::vector<std::uint32_t> lengths_;
  std::vector<std::uint64_t> wide_;
  std::uint64_t records_ = 0, end_ = 0;
  std::vector<Damage> damage_;
  std::string note_;
  Spans kept_;
  std::shared_ptr<const File> sidecar_;  // that has the arrays of kept_
};

// All files of a channel, in the catalogue's order: record 0 is the first of the first file. Copies share the arrays.
class Index {
 public:
  // Throws std::invalid_argument: not one part for each file. DataError(changed): a part ends after its file.
  Index(Files files, std::vector<std::shared_ptr<const FileIndex>> parts);
  Index(Files files, std::vector<FileIndex> parts);
  std::uint64_t records() const noexcept { return first_.back(); }
  const Files& files() const noexcept { return *files_; }
  const FileIndex& part(std::size_t file) const noexcept { return *parts_[file]; }
  const std::vector<std::shared_ptr<const FileIndex>>& parts() const noexcept { return parts_; }
  // The first record of each file; then the number of all.
  const std::vector<std::uint64_t>& first() const noexcept { return first_; }
  Place place(std::uint64_t record) const noexcept;  // record < records()
  // Brings near what place() will look up.
  [[gnu::always_inline]] void bring_near(std::uint64_t record) const noexcept {  // see near.h
    const std::size_t file = file_of(record);
    spans_[file].bring_near(record - first_[file]);
  }
  // Of all records, with their frames.
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  std::size_t file_of(std::uint64_t record) const noexcept {
    const auto after = std::upper_bound(first_.begin(), first_.end(), record);
    return static_cast<std::size_t>(after - first_.begin()) - 1;
  }

  std::shared_ptr<const Files> files_;
  std::vector<std::shared_ptr<const FileIndex>> parts_;
  std::vector<Spans> spans_;
  std::vector<std::uint64_t> first_;
  std::uint64_t bytes_ = 0;
};

}  // namespace launcher::data

#endif
