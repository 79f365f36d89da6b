#include "files_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "launcher/descriptor.h"

namespace launcher::data {
namespace {

class FilesSource final : public Source {
 public:
  FilesSource(const std::string& root, const std::vector<Entry>& entries, std::vector<std::int64_t> labels)
      : root_(root), labels_(std::move(labels)) {
    if (!labels_.empty() && labels_.size() != entries.size()) {
      throw std::invalid_argument(std::to_string(labels_.size()) + " labels for " + std::to_string(entries.size()) +
                                  " files");
    }
    fields_.push_back({"data", Kind::ragged, DType::uint8, {}});
    if (!labels_.empty()) {
      fields_.push_back({"label", Kind::fixed, DType::int64, {}});
    }
    names_begin_.reserve(entries.size() + 1);
    sizes_.reserve(entries.size());
    modified_ns_.reserve(entries.size());
    names_begin_.push_back(0);
    for (const Entry& entry : entries) {
      names_ += entry.path;
      names_begin_.push_back(names_.size());
      sizes_.push_back(entry.size);
      modified_ns_.push_back(entry.modified_ns);
      bytes_ += entry.size;
    }
  }

  std::uint64_t records() const noexcept override { return sizes_.size(); }
  std::uint64_t bytes() const noexcept override { return bytes_; }
  const std::vector<Field>& fields() const noexcept override { return fields_; }
  std::unique_ptr<Scratch> make_scratch() const override { return std::make_unique<Scratch>(); }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override {
    return {problem, path(record), 0, 0, text};
  }

  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch&) const override {
    for (const std::uint64_t record : records) {
      const std::size_t row = batch.rows;
      Column& column = batch.columns[0];
      const std::uint64_t size = sizes_[static_cast<std::size_t>(record)];
      std::byte* to = append(column, row, static_cast<std::size_t>(size), 1);
      read(record, to, size);
      column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(size);
      if (!labels_.empty()) {
        batch.columns[1].fixed_row<std::int64_t>(row, 1)[0] = labels_[static_cast<std::size_t>(record)];
      }
      ++batch.rows;
    }
  }

 private:
  std::string path(std::uint64_t record) const {
    const auto i = static_cast<std::size_t>(record);
    const std::uint64_t begin = names_begin_[i];
    return root_ + "/" +
           names_.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(names_begin_[i + 1] - begin));
  }

  void read(std::uint64_t record, std::byte* to, std::uint64_t size) const {
    const std::string name = path(record);
    const auto refused = [&](const char* what, std::uint64_t offset) {
      const Problem problem = errno == ENOENT ? Problem::changed : Problem::unreadable;
      throw DataError(problem, name, offset, 0, std::string(what) + ": " + std::generic_category().message(errno));
    };
    const Descriptor file(open(name.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) {
      refused("can not be opened", kNowhere);
    }
    std::uint64_t at = 0;
    while (at < size) {
      const ssize_t got = pread(file.get(), to + at, static_cast<std::size_t>(size - at), static_cast<off_t>(at));
      if (got < 0) {
        if (errno == EINTR) {
          continue;
        }
        refused("can not be read", at);
      }
      if (got == 0) {
        throw DataError(Problem::changed, name, at, 0,
                        "the file ends here, and had " + std::to_string(size) +
                            " bytes when the channel was opened; open it again");
      }
      at += static_cast<std::uint64_t>(got);
    }
    struct stat status{};
    if (fstat(file.get(), &status) != 0) {
      refused("can not be looked at", kNowhere);
    }
    const std::int64_t modified_ns = status.st_mtim.tv_sec * std::int64_t{1'000'000'000} + status.st_mtim.tv_nsec;
    if (status.st_size != static_cast<off_t>(size)) {
      throw DataError(Problem::changed, name, size, 0,
                      "the file has " + std::to_string(status.st_size) + " bytes, and had " + std::to_string(size) +
                          " when the channel was opened; open it again");
    }
    if (modified_ns != modified_ns_[static_cast<std::size_t>(record)]) {
      throw DataError(Problem::changed, name, kNowhere, 0,
                      "the file was written to after the channel was opened; open it again");
    }
  }

  std::string root_;
  std::string names_;  // one after the other
  std::vector<std::uint64_t> names_begin_;
  std::vector<std::uint64_t> sizes_;
  std::vector<std::int64_t> modified_ns_;
  std::vector<std::int64_t> labels_;
  std::vector<Field> fields_;
  std::uint64_t bytes_ = 0;
};

}  // namespace

std::shared_ptr<const Source> files_source(const std::string& root, const std::vector<Entry>& entries,
                                           std::vector<std::int64_t> labels) {
  return std::make_shared<FilesSource>(root, entries, std::move(labels));
}

}  // namespace launcher::data
