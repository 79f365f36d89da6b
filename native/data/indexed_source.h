// Records that an index finds and a codec takes apart.
//
// A codec is a class with
//   struct State;                                                   what one thread keeps between records
//   const std::vector<Field>& fields() const noexcept;
//   void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
//               State& state) const;
// decode() puts one record (with its frame) into row `row`, and throws DataError; then the columns are as before.
#ifndef LAUNCHER_DATA_INDEXED_SOURCE_H
#define LAUNCHER_DATA_INDEXED_SOURCE_H

#include <algorithm>
#include <array>
#include <utility>

#include "index.h"
#include "near.h"
#include "source.h"
#include "stream_decoder.h"

namespace launcher::data {

template <typename Codec>
class IndexedSource final : public Source {
 public:
  IndexedSource(Index index, Codec codec) : index_(std::move(index)), codec_(std::move(codec)) {}

  std::uint64_t records() const noexcept override { return index_.records(); }
  std::uint64_t bytes() const noexcept override { return index_.bytes(); }
  const std::vector<Field>& fields() const noexcept override { return codec_.fields(); }
  std::span<const std::shared_ptr<const File>> files() const noexcept override { return index_.files(); }
  std::unique_ptr<Scratch> make_scratch() const override { return std::make_unique<State>(); }
  std::shared_ptr<StreamDecoder> make_stream_decoder() const override { return stream_decoder(codec_); }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override {
    const Place place = index_.place(record);
    return {problem, index_.files()[place.file]->path(), place.offset, place.number, text};
  }

  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch& scratch) const override {
    State& state = static_cast<State&>(scratch);
    std::array<Place, kVisitAhead> places;  // a ring
    const auto locate = [&](std::size_t i) -> std::span<const std::byte> {
      if (i + kVisitAhead < records.size()) {
        index_.bring_near(records[i + kVisitAhead]);
      }
      const Place place = places[i % kVisitAhead] = index_.place(records[i]);
      const File& file = *index_.files()[place.file];
      if (!file.mapped() || place.offset > file.size() || place.bytes > file.size() - place.offset) {
        return {};  // take() reads it, or says that the index is another file's
      }
      return file.contents().subspan(place.offset, place.bytes);
    };
    for (std::size_t i = 0; i < std::min(records.size(), kVisitAhead); ++i) {
      index_.bring_near(records[i]);
    }
    visit(records.size(), locate, [&](std::size_t i) { take(places[i % kVisitAhead], batch, state); });
  }

  void expect(std::span<const std::uint64_t> records) const noexcept override {
    for (const std::uint64_t record : records) {
      const Place place = index_.place(record);
      index_.files()[place.file]->expect(place.offset, place.bytes);
    }
  }

 private:
  struct State final : Scratch {
    typename Codec::State codec;
    Buffer memory;  // of a record that is read
  };

  void take(const Place& place, Batch& batch, State& state) const {
    const File& file = *index_.files()[place.file];
    if (!file.mapped() && state.memory.capacity() < place.bytes) {
      state.memory.reserve(place.bytes, 0);
    }
    const auto bytes = file.view(place.offset, place.bytes, state.memory.data());
    try {
      codec_.decode(bytes, place, file, batch.rows, batch, state.codec);
    } catch (const DataError&) {
      check_faults(place);  // what was lost is the cause, if anything was
      throw;
    }
    check_faults(place);
    ++batch.rows;
  }

  void check_faults(const Place& place) const {
    if (file_faults() != 0) {
      index_.files()[place.file]->check_faults(place.offset, place.bytes);
      index_.part(place.file).check_faults();
    }
  }

  Index index_;
  Codec codec_;
};

}  // namespace launcher::data

#endif
