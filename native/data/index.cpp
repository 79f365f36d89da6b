#include "index.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace launcher::data {
namespace {

constexpr std::uint64_t kMost = std::numeric_limits<std::uint32_t>::max();

}  // namespace

FileIndex::FileIndex(const Spans& spans, std::shared_ptr<const File> sidecar)
    : records_(spans.records), end_(spans.end), sidecar_(std::move(sidecar)) {
  if (sidecar_) {
    kept_ = spans;
  } else if (spans.wide != nullptr) {
    wide_.assign(spans.wide, spans.wide + 2 * spans.records);
  } else if (spans.records != 0) {
    bases_.assign(spans.bases, spans.bases + (spans.records + Spans::kBlock - 1) / Spans::kBlock);
    deltas_.assign(spans.deltas, spans.deltas + spans.records);
    if (spans.lengths != nullptr) {
      lengths_.assign(spans.lengths, spans.lengths + spans.records);
    }
  }
}

Spans FileIndex::spans() const noexcept {
  if (sidecar_) {
    return kept_;
  }
  return {bases_.data(),
          deltas_.data(),
          lengths_.empty() ? nullptr : lengths_.data(),
          wide_.empty() ? nullptr : wide_.data(),
          records_,
          end_};
}

void FileIndex::add(std::uint64_t offset, std::uint64_t bytes) {
  // The way of almost every record: it follows the one before, in a file of none that stands apart.
  if (records_ % Spans::kBlock != 0 && !bases_.empty() && lengths_.empty() && offset == end_ && bytes <= kMost &&
      offset - bases_.back() <= kMost && bytes <= std::numeric_limits<std::uint64_t>::max() - offset) {
    deltas_.push_back(static_cast<std::uint32_t>(offset - bases_.back()));
    ++records_;
    end_ = offset + bytes;
    return;
  }
  add_apart(offset, bytes);
}

void FileIndex::add_apart(std::uint64_t offset, std::uint64_t bytes) {
  if (sidecar_ || offset < end_ || bytes > std::numeric_limits<std::uint64_t>::max() - offset) {
    throw std::invalid_argument("records are added in the order of the file, to an index that is being made");
  }
  const bool begins_block = records_ % Spans::kBlock == 0;
  if (wide_.empty() && (bytes > kMost || (!begins_block && offset - bases_.back() > kMost))) {
    widen();
  }
  if (!wide_.empty()) {
    wide_.push_back(offset);
    wide_.push_back(bytes);
  } else {
    if (lengths_.empty() && records_ != 0 && offset != end_) {
      lengths_.reserve(deltas_.size() + 1);
      for (std::uint64_t number = 0; number < records_; ++number) {
        const std::uint64_t length =
            (number + 1 < records_ ? bases_[(number + 1) / Spans::kBlock] + deltas_[number + 1] : end_) -
            bases_[number / Spans::kBlock] - deltas_[number];
        lengths_.push_back(static_cast<std::uint32_t>(length));
      }
    }
    if (begins_block) {
      bases_.push_back(offset);
    }
    deltas_.push_back(static_cast<std::uint32_t>(offset - bases_.back()));
    if (!lengths_.empty()) {
      lengths_.push_back(static_cast<std::uint32_t>(bytes));
    }
  }
  ++records_;
  end_ = offset + bytes;
}

void FileIndex::widen() {
  std::vector<std::uint64_t> wide;
  wide.reserve(2 * (records_ + 1));
  for (std::uint64_t number = 0; number < records_; ++number) {
    const auto [offset, bytes] = at(number);
    wide.push_back(offset);
    wide.push_back(bytes);
  }
  wide_ = std::move(wide);
  bases_ = {};
  deltas_ = {};
  lengths_ = {};
}

namespace {

std::vector<std::shared_ptr<const FileIndex>> shared(std::vector<FileIndex> parts) {
  std::vector<std::shared_ptr<const FileIndex>> result;
  result.reserve(parts.size());
  for (FileIndex& part : parts) {
    result.push_back(std::make_shared<const FileIndex>(std::move(part)));
  }
  return result;
}

}  // namespace

Index::Index(Files files, std::vector<FileIndex> parts) : Index(std::move(files), shared(std::move(parts))) {}

Index::Index(Files files, std::vector<std::shared_ptr<const FileIndex>> parts) {
  if (files.size() != parts.size()) {
    throw std::invalid_argument("an index has one part for each file");
  }
  spans_.reserve(parts.size());
  first_.reserve(parts.size() + 1);
  first_.push_back(0);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Spans spans = parts[i]->spans();
    if (spans.end > files[i]->size()) {
      throw DataError(Problem::changed, files[i]->path(), kNowhere, kNowhere,
                      "its index is of a file of at least " + std::to_string(spans.end) + " bytes, it has " +
                          std::to_string(files[i]->size()) + "; index it again");
    }
    if (spans.records != 0) {
      std::uint64_t damaged = 0;
      for (const Damage& damage : parts[i]->damage()) {
        damaged += damage.offset < spans.end ? std::min(damage.bytes, spans.end - damage.offset) : 0;
      }
      const std::uint64_t extent = spans.end - spans.at(0).first;
      bytes_ += extent - std::min(extent, damaged);
    }
    spans_.push_back(spans);
    first_.push_back(first_.back() + spans.records);
  }
  files_ = std::make_shared<const Files>(std::move(files));
  parts_ = std::move(parts);
}

Place Index::place(std::uint64_t record) const noexcept {
  const std::size_t file = file_of(record);
  const std::uint64_t number = record - first_[file];
  const auto [offset, bytes] = spans_[file].at(number);
  return {file, offset, bytes, number};
}

}  // namespace launcher::data
