#include "stream_cursor.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace launcher::data {
namespace {

class Cursor final : public Source {
 public:
  explicit Cursor(std::shared_ptr<StreamDecoder> decoder) : decoder_(std::move(decoder)) {}

  // Valid for the fetches until the next call; all by one thread.
  void look_at(std::span<const std::byte> record, const Place& place, const File& stream) const noexcept {
    record_ = record;
    place_ = place;
    stream_ = &stream;
  }

  std::uint64_t records() const noexcept override { return 1; }
  std::uint64_t bytes() const noexcept override { return 0; }
  const std::vector<Field>& fields() const noexcept override { return decoder_->fields(); }
  std::unique_ptr<Scratch> make_scratch() const override { return std::make_unique<Scratch>(); }
  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch&) const override {
    for (std::size_t i = 0; i < records.size(); ++i) {
      decoder_->decode(record_, place_, *stream_, batch.rows, batch);
      ++batch.rows;
    }
  }
  DataError describe(Problem problem, std::uint64_t, const std::string& text) const override {
    return {problem, stream_->path(), place_.offset, place_.number, text};
  }

 private:
  std::shared_ptr<StreamDecoder> decoder_;
  mutable std::span<const std::byte> record_;
  mutable Place place_{};
  mutable const File* stream_ = nullptr;
};

class CursorDecoder final : public StreamDecoder {
 public:
  CursorDecoder(std::shared_ptr<const Cursor> cursor, std::shared_ptr<const Source> source)
      : cursor_(std::move(cursor)), source_(std::move(source)), scratch_(source_->make_scratch()) {}

  const std::vector<Field>& fields() const noexcept override { return source_->fields(); }
  void decode(std::span<const std::byte> record, const Place& place, const File& stream, std::size_t row,
              Batch& batch) override {
    constexpr std::array<std::uint64_t, 1> only{0};
    cursor_->look_at(record, place, stream);
    batch.rows = row;
    try {
      source_->fetch(only, batch, *scratch_);
    } catch (const DataError&) {
      batch.rows = row;
      throw;
    }
    batch.rows = row;  // counted by who asked
  }

 private:
  std::shared_ptr<const Cursor> cursor_;
  std::shared_ptr<const Source> source_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace

std::shared_ptr<const Source> stream_cursor(std::shared_ptr<StreamDecoder> decoder) {
  return std::make_shared<Cursor>(std::move(decoder));
}

std::shared_ptr<StreamDecoder> cursor_decoder(std::shared_ptr<const Source> cursor,
                                              std::shared_ptr<const Source> source) {
  auto own = std::dynamic_pointer_cast<const Cursor>(std::move(cursor));
  if (own == nullptr) {
    throw std::invalid_argument("this source is no cursor of a stream");
  }
  return std::make_shared<CursorDecoder>(std::move(own), std::move(source));
}

}  // namespace launcher::data
