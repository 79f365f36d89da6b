// Archives of tar: POSIX ustar and pax, and GNU's; the samples that WebDataset keeps in them.
//
// A sample is a run of regular members whose names are equal up to the first dot after the last slash (the key); what
// follows that dot, in lower case, names the field. Members without a key or without an extension, those below a
// folder named __like_this__, and whatever is no regular file belong to no sample.
#ifndef LAUNCHER_DATA_TAR_H
#define LAUNCHER_DATA_TAR_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index.h"
#include "indexed_source.h"
#include "window.h"

namespace launcher::data {

// A file, or bytes of it from `base` on that are in memory already.
class TarBytes {
 public:
  TarBytes(std::span<const std::byte> bytes, std::uint64_t base, const std::string& path);
  explicit TarBytes(const File& file);

  std::uint64_t end() const noexcept { return end_; }
  const std::string& path() const noexcept { return path_; }
  // Valid until the next call. offset + count is at most end().
  std::span<const std::byte> view(std::uint64_t offset, std::size_t count);

 private:
  const std::string& path_;
  std::span<const std::byte> bytes_;
  std::uint64_t base_ = 0, end_ = 0;
  std::optional<Window> window_;
};

struct TarMember {
  std::string name;
  bool regular = false;
  std::uint64_t begin = 0;  // of its first header: of the long name that comes before it, say
  std::uint64_t data = 0, size = 0;
  std::uint64_t end = 0;  // of the padding

  // The parts of the name; both empty where it belongs to no sample.
  std::string_view key, extension;  // in `name`
};

class TarReader {
 public:
  // `archive`: there must be an end-of-archive marker; else the members just end.
  TarReader(TarBytes& bytes, std::uint64_t begin, bool archive, std::uint64_t record = kNowhere);

  // False at the end. Throws DataError: truncated, malformed.
  bool next(TarMember& member);
  std::uint64_t offset() const noexcept { return offset_; }  // of what comes next
  std::uint64_t record = kNowhere;                           // for messages

 private:
  struct Extended;  // what headers say about the member that follows them

  [[noreturn]] void fail(Problem problem, std::uint64_t offset, const std::string& text) const;
  bool at_end();
  void check_rest_is_zero(std::uint64_t offset);
  std::string text_of(std::uint64_t offset, std::uint64_t size);
  void read_pax(const std::string& text, std::uint64_t offset, Extended& extended) const;

  TarBytes& bytes_;
  std::uint64_t offset_;
  bool archive_;
};

// The samples of an archive. `skip`: what is damaged is left out with its whole sample and noted, else DataError.
FileIndex scan_tar(TarBytes bytes, bool skip);
FileIndex scan_tar(const File& file, bool skip);

// The extensions of the first sample, in the archive's order; none where there is no sample.
std::vector<std::string> tar_extensions(const Index& index);

struct TarField {
  std::string name;      // an extension, or "key"
  bool integer = false;  // decimal text that becomes an int64
};

class TarCodec {
 public:
  struct State {
    TarMember member;
    std::vector<std::span<const std::byte>> found;
    std::vector<std::uint8_t> seen;
    std::vector<std::int64_t> integers;
    std::string key, extension;
  };

  // `exact`: a sample with an extension that is none of `wanted` is an error. Throws std::invalid_argument: two fields
  // of the same name.
  TarCodec(std::vector<TarField> wanted, bool exact);
  const std::vector<Field>& fields() const noexcept { return fields_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

 private:
  std::vector<TarField> wanted_;
  std::vector<Field> fields_;
  bool exact_;
};

std::shared_ptr<const Source> tar_source(Index index, std::vector<TarField> wanted, bool exact);

}  // namespace launcher::data

#endif
