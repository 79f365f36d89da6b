#include "fixed_source.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "near.h"

namespace launcher::data {
namespace {

class FixedSource final : public Source {
 public:
  FixedSource(Files files, std::vector<std::uint64_t> headers, std::uint64_t stride, std::vector<FixedField> fields);

  std::uint64_t records() const noexcept override { return first_.back(); }
  std::uint64_t bytes() const noexcept override { return records() * stride_; }
  std::span<const std::shared_ptr<const File>> files() const noexcept override { return files_; }
  const std::vector<Field>& fields() const noexcept override { return fields_; }
  std::unique_ptr<Scratch> make_scratch() const override { return std::make_unique<State>(); }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override;
  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch& scratch) const override;
  void expect(std::span<const std::uint64_t> records) const noexcept override {
    for (const std::uint64_t record : records) {
      const std::size_t file = file_of(record);
      files_[file]->expect(offset_in(file, record) + begin_, end_ - begin_);
    }
  }

 private:
  struct State final : Scratch {
    Buffer memory;  // of a record that is read
    std::vector<std::byte*> targets;
  };

  struct Copy {
    std::size_t column, offset, bytes;
  };

  std::size_t file_of(std::uint64_t record) const noexcept {
    return static_cast<std::size_t>(std::upper_bound(first_.begin(), first_.end(), record) - first_.begin()) - 1;
  }
  std::uint64_t offset_in(std::size_t file, std::uint64_t record) const noexcept {
    return headers_[file] + (record - first_[file]) * stride_;
  }
  // Of mapped files.
  const std::byte* address_of(std::uint64_t record) const noexcept {
    const std::size_t file = starts_.size() == 1 ? 0 : file_of(record);
    return starts_[file] + (record - first_[file]) * stride_;
  }
  template <std::size_t kColumns>
  void gather(std::span<const std::uint64_t> records, State& state) const noexcept;
  void gather(std::span<const std::uint64_t> records, State& state) const noexcept;
  void read(std::span<const std::uint64_t> records, Batch& batch, State& state) const;

  Files files_;
  std::vector<std::uint64_t> headers_;
  std::size_t stride_;
  std::vector<Field> fields_;
  std::vector<Copy> copies_;              // of what is not empty
  std::size_t begin_ = 0, end_ = 0;       // the part of a record that is wanted
  std::vector<std::uint64_t> first_;      // the first record of each file; then the number of all
  std::vector<const std::byte*> starts_;  // of the first record in memory; empty when a file is not mapped
};

FixedSource::FixedSource(Files files, std::vector<std::uint64_t> headers, std::uint64_t stride,
                         std::vector<FixedField> fields)
    : files_(std::move(files)), headers_(std::move(headers)), stride_(static_cast<std::size_t>(stride)) {
  if (stride == 0) {
    throw std::invalid_argument("stride is 0; expected the bytes of a record");
  }
  if (headers_.size() != files_.size()) {
    throw std::invalid_argument(std::to_string(headers_.size()) + " headers for " + std::to_string(files_.size()) +
                                " files; expected one for each");
  }
  begin_ = stride_;
  for (FixedField& given : fields) {
    // A shape whose product overflows would pass any other check.
    std::uint64_t bytes = size_of(given.field.dtype);
    for (const std::uint64_t extent : given.field.shape) {
      bytes = extent != 0 && bytes > stride / extent ? stride + 1 : bytes * extent;
    }
    if (bytes > stride || given.offset > stride - bytes) {
      throw std::invalid_argument("field '" + given.field.name + "' at byte " + std::to_string(given.offset) +
                                  " ends after the record of " + std::to_string(stride) + " bytes");
    }
    if (bytes != 0) {
      copies_.push_back({fields_.size(), static_cast<std::size_t>(given.offset), static_cast<std::size_t>(bytes)});
      begin_ = std::min(begin_, copies_.back().offset);
      end_ = std::max(end_, copies_.back().offset + copies_.back().bytes);
    }
    given.field.kind = Kind::fixed;
    fields_.push_back(std::move(given.field));
  }
  bool mapped = true;
  first_.push_back(0);
  for (std::size_t number = 0; number < files_.size(); ++number) {
    const File& file = *files_[number];
    const std::uint64_t header = headers_[number];
    if (file.size() < header) {
      throw DataError(Problem::truncated, file.path(), file.size(), kNowhere,
                      "the file ends in its header: " + std::to_string(file.size()) + " bytes of " +
                          std::to_string(header) + "; copy it again");
    }
    const std::uint64_t body = file.size() - header;
    if (const std::uint64_t rest = body % stride; rest != 0) {
      throw DataError(Problem::truncated, file.path(), file.size() - rest, body / stride,
                      std::to_string(rest) + " bytes are left of a record of " + std::to_string(stride) +
                          "; the file was cut, or its records are of another size");
    }
    first_.push_back(first_.back() + body / stride);
    mapped = mapped && file.mapped();
  }
  if (mapped) {
    for (std::size_t number = 0; number < files_.size(); ++number) {
      starts_.push_back(files_[number]->contents().data() + headers_[number]);
    }
  }
}

DataError FixedSource::describe(Problem problem, std::uint64_t record, const std::string& text) const {
  const std::size_t file = file_of(record);
  return {problem, files_[file]->path(), offset_in(file, record), record - first_[file], text};
}

// As visit(), in fewer instructions: copying is all there is to do here, so that the processor gets to see several
// records at a time. kColumns: how many there are, so that what this needs stays in registers; 0: as many as there are.
template <std::size_t kColumns>
void FixedSource::gather(std::span<const std::uint64_t> records, State& state) const noexcept {
  std::array<Copy, std::max<std::size_t>(kColumns, 1)> few_copies;
  std::array<std::byte*, std::max<std::size_t>(kColumns, 1)> few_targets;
  const Copy* copies = copies_.data();
  std::byte** targets = state.targets.data();
  if constexpr (kColumns != 0) {
    std::copy_n(copies, kColumns, few_copies.begin());
    std::copy_n(targets, kColumns, few_targets.begin());
    copies = few_copies.data();
    targets = few_targets.data();
  }
  const std::size_t columns = kColumns != 0 ? kColumns : copies_.size();
  constexpr std::size_t kAhead = 8;
  std::array<const std::byte*, kAhead> ahead;  // a ring: records whose first lines are on their way
  const std::size_t begin = begin_, wanted = end_ - begin_;
  const std::size_t first = std::min(records.size(), kAhead);
  for (std::size_t i = 0; i < first; ++i) {
    ahead[i] = address_of(records[i]);
    bring_near(ahead[i] + begin, wanted);
  }
  for (std::size_t i = 0; i < records.size(); ++i) {
    const std::byte* record = ahead[i % kAhead];
    if (i + kAhead < records.size()) {
      const std::byte* next = address_of(records[i + kAhead]);
      ahead[i % kAhead] = next;
      bring_near(next + begin, wanted);
    }
    for (std::size_t number = 0; number < columns; ++number) {
      const Copy copy = copies[number];
      copy_near(targets[number], record + copy.offset, copy.bytes);
      targets[number] += copy.bytes;
    }
  }
}

void FixedSource::gather(std::span<const std::uint64_t> records, State& state) const noexcept {
  switch (copies_.size()) {
    case 1:
      return gather<1>(records, state);
    case 2:
      return gather<2>(records, state);
    case 3:
      return gather<3>(records, state);
    default:
      return gather<0>(records, state);
  }
}

void FixedSource::read(std::span<const std::uint64_t> records, Batch& batch, State& state) const {
  state.memory.reserve(end_ - begin_, 0);
  for (const std::uint64_t record : records) {
    const std::size_t file = file_of(record);
    const auto bytes = files_[file]->view(offset_in(file, record) + begin_, end_ - begin_, state.memory.data());
    for (std::size_t number = 0; number < copies_.size(); ++number) {
      const Copy copy = copies_[number];
      std::memcpy(state.targets[number], bytes.data() + (copy.offset - begin_), copy.bytes);
      state.targets[number] += copy.bytes;
    }
    ++batch.rows;
  }
}

void FixedSource::fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch& scratch) const {
  if (copies_.empty() || records.empty()) {
    batch.rows += records.size();
    return;
  }
  State& state = static_cast<State&>(scratch);
  state.targets.clear();
  for (const Copy& copy : copies_) {
    state.targets.push_back(batch.columns[copy.column].values.data() + batch.rows * copy.bytes);
  }
  if (starts_.empty()) {
    read(records, batch, state);
    return;
  }
  gather(records, state);
  if (file_faults() != 0) {
    for (const std::uint64_t record : records) {
      const std::size_t file = file_of(record);
      files_[file]->check_faults(offset_in(file, record) + begin_, end_ - begin_);
      ++batch.rows;
    }
  } else {
    batch.rows += records.size();
  }
}

}  // namespace

std::shared_ptr<const Source> fixed_source(Files files, std::vector<std::uint64_t> headers, std::uint64_t stride,
                                           std::vector<FixedField> fields) {
  return std::make_shared<FixedSource>(std::move(files), std::move(headers), stride, std::move(fields));
}

}  // namespace launcher::data
