#include "error.h"

namespace launcher::data {
namespace {

std::string describe(const std::string& file, std::uint64_t offset, std::uint64_t record, const std::string& text) {
  std::string all = file;
  if (offset != kNowhere) {
    all += ": byte " + std::to_string(offset);
  }
  if (record != kNowhere) {
    all += ": record " + std::to_string(record);
  }
  return all + ": " + text;
}

}  // namespace

DataError::DataError(Problem problem, const std::string& file, std::uint64_t offset, std::uint64_t record,
                     const std::string& text)
    : std::runtime_error(describe(file, offset, record, text)),
      problem_(problem),
      file_(std::make_shared<const std::string>(file)),
      offset_(offset),
      record_(record) {}

}  // namespace launcher::data
