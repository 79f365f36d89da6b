// One file of a channel, as it was when it was opened.
#ifndef LAUNCHER_DATA_FILE_H
#define LAUNCHER_DATA_FILE_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "fault.h"
#include "launcher/descriptor.h"

namespace launcher::data {

// A page of a mapped file that can not be read any more (the file was cut, the disk failed) does not end the process:
// it reads as zeros from then on, and that is remembered (fault.h). Whoever has read from a mapped file asks
// afterwards:
//   if (file_faults() != 0) file.check_faults(offset, bytes);   one load, unless something is wrong
// What no fault can show: in the last page of a file that was cut, the bytes after its end read as zeros, too.
// check_unchanged() shows it.

enum class Access : std::uint8_t {
  automatic = 0,  // mapped, or read where the file system is FUSE
  mapped = 1,
  read = 2,  // pread: for what FUSE serves, where a page fault is dear and an error would be a signal
};

enum class Pattern : std::uint8_t {
  onward = 0,     // mostly from front to back: the kernel reads ahead
  scattered = 1,  // anywhere, and there is no memory to keep it all: only what is touched is read
  kept = 2,       // all of it, in any order, and there is memory for it: huge pages, each read as a whole
};

// Whether what is at `path` is served by FUSE (SageMaker's FastFile mode). Throws DataError(changed, unreadable).
bool served_by_fuse(const std::string& path);

class File {
 public:
  // Throws DataError: changed (it is not there any more), unreadable (also: it is no regular file).
  File(std::string path, Access access = Access::automatic);
  // The name of a stream, for the messages of codecs: no contents.
  struct OfStream {};
  File(OfStream, std::string name) : path_(std::move(name)), mapped_(true) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  const std::string& path() const noexcept { return path_; }
  std::uint64_t size() const noexcept { return size_; }
  std::int64_t modified_ns() const noexcept { return modified_ns_; }
  bool mapped() const noexcept { return mapped_; }
  // All of it. Mapped files only.
  std::span<const std::byte> contents() const noexcept { return {data_, static_cast<std::size_t>(size_)}; }
  // `bytes` from `offset` on, in place where the file is mapped, else read into `memory` (of `bytes` at least).
  // What is read comes in pieces of 1 MiB at least, which are kept for what is read next (extents.h).
  // Throws DataError: changed (the file has become shorter), unreadable.
  std::span<const std::byte> view(std::uint64_t offset, std::size_t bytes, std::byte* memory) const;
  // Throws DataError(changed or unreadable, with the offset) when a page of these bytes could not be read, or of all
  // the file.
  void check_faults(std::uint64_t offset, std::uint64_t bytes) const;
  void check_faults() const { check_faults(0, size_); }
  // Throws DataError(changed) when size or time of change are not what they were, by the path. Called before an epoch:
  // it also sees to it that faults still come to our handler.
  void check_unchanged() const;
  // Says what the pages of a mapped file are wanted for.
  void advise(Pattern pattern) const noexcept;
  // Asks the disk for what of these bytes is not in memory, and does not wait for it. Mapped files only.
  void expect(std::uint64_t offset, std::uint64_t bytes) const noexcept;
  // Maps the pages of a range at once, for who is about to touch each of them: a fault maps some of them only.
  void populate(std::uint64_t offset, std::uint64_t bytes) const noexcept;

 private:
  void read(std::uint64_t offset, std::span<std::byte> memory) const;
  void advise_range(std::uint64_t offset, std::uint64_t bytes, int advice) const noexcept;

  std::string path_;
  std::uint64_t size_ = 0;
  std::int64_t modified_ns_ = 0;
  Descriptor descriptor_;     // of files that are read; none where too many are open: they are opened for each read
  std::uint64_t number_ = 0;  // of a file that is read, in the cache
  bool mapped_ = false;
  const std::byte* data_ = nullptr;
  std::size_t region_ = kNoRegion;
};

using Files = std::vector<std::shared_ptr<const File>>;

// Says what files are wanted for whose every record is wanted, in any order or onward; and what that is.
Pattern advise(std::span<const std::shared_ptr<const File>> files, bool any_order) noexcept;

}  // namespace launcher::data

#endif
