// What a channel's records are read through, whatever their format.
#ifndef LAUNCHER_DATA_SOURCE_H
#define LAUNCHER_DATA_SOURCE_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "batch.h"
#include "error.h"
#include "file.h"

namespace launcher::data {

// What one thread keeps from record to record: the shape of the last one, memory to parse in.
struct Scratch {
  virtual ~Scratch() = default;
};

class StreamDecoder;

// Immutable once made; any number of threads may fetch at the same time, each with a scratch of its own.
class Source {
 public:
  Source() = default;
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;
  virtual ~Source() = default;

  virtual std::uint64_t records() const noexcept = 0;
  virtual const std::vector<Field>& fields() const noexcept = 0;
  virtual std::unique_ptr<Scratch> make_scratch() const = 0;
  // Puts `records` into rows batch.rows and on, and counts each in batch.rows when all its columns are complete.
  // Throws DataError for the record that is to become row batch.rows; the rows before it stand.
  virtual void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch& scratch) const = 0;
  // File, offset and number in the file of a record, for messages.
  virtual DataError describe(Problem problem, std::uint64_t record, const std::string& text) const = 0;
  // Bytes of the files that hold the records, for planning extents: the mean of a record is bytes() / records().
  virtual std::uint64_t bytes() const noexcept = 0;
  // The files that records are read from. The engine asks them whether a page could not be read, and whether they are
  // still as they were when they were opened.
  virtual std::span<const std::shared_ptr<const File>> files() const noexcept { return {}; }
  // These records will be wanted soon: what of them is not in memory is asked of the disk, all of it at the same time.
  virtual void expect(std::span<const std::uint64_t>) const noexcept {}
  // For records like these that come through a pipe. Null: they can not.
  virtual std::shared_ptr<StreamDecoder> make_stream_decoder() const { return nullptr; }
};

}  // namespace launcher::data

#endif
