// A look at a file from one place to the next, as a scanner goes.
#ifndef LAUNCHER_DATA_WINDOW_H
#define LAUNCHER_DATA_WINDOW_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "batch.h"
#include "file.h"

namespace launcher::data {

// Of a mapped file, all of it in place. Of a file that is read, a block at a time: going forward, each byte is read
// about once, in requests that suit what FUSE serves.
class Window {
 public:
  static constexpr std::size_t kBlockBytes = std::size_t{1} << 20;

  explicit Window(const File& file) : file_(file), whole_(file.mapped()) {
    if (whole_) {
      view_ = file.contents();
    }
  }

  std::uint64_t size() const noexcept { return file_.size(); }
  // What is there from `offset` on: `bytes` at least, which must not go past the end of the file; valid until the next
  // call. Throws DataError: changed, unreadable.
  std::span<const std::byte> at(std::uint64_t offset, std::size_t bytes) {
    if (!whole_ && (offset < begin_ || offset - begin_ > view_.size() || view_.size() - (offset - begin_) < bytes)) {
      const std::size_t wanted =
          static_cast<std::size_t>(std::min<std::uint64_t>(std::max(bytes, kBlockBytes), file_.size() - offset));
      memory_.reserve(wanted, 0);
      view_ = file_.view(offset, wanted, memory_.data());
      begin_ = offset;
    }
    return view_.subspan(static_cast<std::size_t>(offset - begin_));
  }

 private:
  const File& file_;
  bool whole_;
  std::uint64_t begin_ = 0;  // of the view, in the file
  std::span<const std::byte> view_;
  Buffer memory_;
};

// What `read()` gives, unless pages of the mapped file could not be read meanwhile: then that is the error, whatever
// was made of the zeros that stood in for them.
template <typename Read>
auto read_checked(const File& file, Read read) {
  const auto check = [&] {
    if (file_faults() != 0) {
      file.check_faults();
    }
  };
  try {
    auto result = read();
    check();
    return result;
  } catch (const DataError&) {
    check();
    throw;
  }
}

}  // namespace launcher::data

#endif
