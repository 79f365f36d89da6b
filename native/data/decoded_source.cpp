#include "decoded_source.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "near.h"

namespace launcher::data {
namespace {

struct Run {
  std::uint64_t begin, count;
};

class DecodedSource final : public Source {
 public:
  explicit DecodedSource(Decoded decoded) : decoded_(std::move(decoded)) {
    const auto invalid = [](const char* text) { throw std::invalid_argument(text); };
    if (!decoded_.file->mapped()) {
      invalid("decoded records are in a file that is mapped");
    }
    if (decoded_.stride == 0 || decoded_.records > decoded_.file->size() / decoded_.stride) {
      invalid("the decoded rows are not all in their file");
    }
    if (decoded_.origins.empty() || decoded_.origins.front().second != 0) {
      invalid("decoded records come from one file at least");
    }
    for (const DecodedField& decoded_field : decoded_.fields) {
      const Field& field = decoded_field.field;
      const std::uint64_t bytes = field.kind == Kind::ragged ? sizeof(Run) : field.values() * size_of(field.dtype);
      if (field.kind == Kind::sparse || decoded_field.offset > decoded_.stride ||
          bytes > decoded_.stride - decoded_field.offset) {
        invalid("a decoded field is not inside its row");
      }
      fields_.push_back(field);
      bytes_.push_back(static_cast<std::size_t>(bytes));
    }
  }

  std::uint64_t records() const noexcept override { return decoded_.records; }
  std::uint64_t bytes() const noexcept override { return decoded_.file->size(); }
  const std::vector<Field>& fields() const noexcept override { return fields_; }
  std::span<const std::shared_ptr<const File>> files() const noexcept override {
    return {&decoded_.file, decoded_.named ? 1U : 0U};
  }
  std::unique_ptr<Scratch> make_scratch() const override { return std::make_unique<Scratch>(); }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override {
    const auto after = std::upper_bound(decoded_.origins.begin(), decoded_.origins.end(), record,
                                        [](std::uint64_t value, const auto& origin) { return value < origin.second; });
    const auto& [path, first] = *std::prev(after);
    return {problem, path, kNowhere, record - first, text};
  }

  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch&) const override {
    const auto stride = static_cast<std::size_t>(decoded_.stride);
    visit(
        records.size(), [&](std::size_t i) { return std::span(row(records[i]), stride); },
        [&](std::size_t i) {
          take(records[i], batch);
          ++batch.rows;
        });
  }

  void expect(std::span<const std::uint64_t> records) const noexcept override {
    for (const std::uint64_t record : records) {
      decoded_.file->expect(record * decoded_.stride, decoded_.stride);
    }
  }

 private:
  const std::byte* row(std::uint64_t record) const noexcept {
    return decoded_.file->contents().data() + record * decoded_.stride;
  }

  void take(std::uint64_t record, Batch& batch) const {
    const std::byte* from = row(record);
    const std::uint64_t size = decoded_.file->size();
    for (std::size_t i = 0; i < fields_.size(); ++i) {
      Column& column = batch.columns[i];
      const std::byte* field = from + decoded_.fields[i].offset;
      if (fields_[i].kind == Kind::fixed) {
        copy_near(column.values.data() + batch.rows * bytes_[i], field, bytes_[i]);
        continue;
      }
      Run run;
      std::memcpy(&run, field, sizeof run);
      const std::size_t item = size_of(fields_[i].dtype);
      if (run.begin > size || run.count > (size - run.begin) / item) {
        throw describe(Problem::changed, record, "the decoded copy of this record is damaged; remove it");
      }
      const auto count = static_cast<std::size_t>(run.count);
      std::byte* to = append(column, batch.rows, count, item);
      copy_near(to, decoded_.file->contents().data() + run.begin, count * item);
      column.offsets[batch.rows + 1] = column.offsets[batch.rows] + static_cast<std::int64_t>(count);
    }
  }

  Decoded decoded_;
  std::vector<Field> fields_;
  std::vector<std::size_t> bytes_;  // of each field in the row
};

}  // namespace

std::shared_ptr<const Source> decoded_source(Decoded decoded) {
  return std::make_shared<DecodedSource>(std::move(decoded));
}

}  // namespace launcher::data
