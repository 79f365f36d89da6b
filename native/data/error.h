// What is wrong with a channel's data, and where.
#ifndef LAUNCHER_DATA_ERROR_H
#define LAUNCHER_DATA_ERROR_H

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace launcher::data {

// The numbers are part of the Python face (launcher/data/errors.py).
enum class Problem : std::uint8_t {
  truncated = 0,   // the file ends inside a record
  malformed = 1,   // these bytes are none of the format
  mismatch = 2,    // a whole record, but not of the channel's schema
  changed = 3,     // the file is not as it was when it was opened
  unreadable = 4,  // the operating system refused it
};

inline constexpr std::uint64_t kNowhere = ~std::uint64_t{0};

// `what()` is "<file>: byte <offset>: record <record>: <text>", without the parts that are not known. `text` says what
// was found, what was wanted, and what to do about it.
class DataError : public std::runtime_error {
 public:
  DataError(Problem problem, const std::string& file, std::uint64_t offset, std::uint64_t record,
            const std::string& text);

  Problem problem() const noexcept { return problem_; }
  const std::string& file() const noexcept { return *file_; }
  std::uint64_t offset() const noexcept { return offset_; }  // in the file, in bytes; kNowhere: the file as a whole
  std::uint64_t record() const noexcept { return record_; }  // in the file, from 0; kNowhere: not known

 private:
  Problem problem_;
  std::shared_ptr<const std::string> file_;  // an exception's copy must not throw
  std::uint64_t offset_, record_;
};

}  // namespace launcher::data

#endif
