// The bytes of one epoch of a Pipe channel.
#ifndef LAUNCHER_DATA_PIPE_H
#define LAUNCHER_DATA_PIPE_H

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "error.h"
#include "launcher/descriptor.h"

namespace launcher::data {

class ByteStream {
 public:
  ByteStream() = default;
  ByteStream(const ByteStream&) = delete;
  ByteStream& operator=(const ByteStream&) = delete;
  virtual ~ByteStream() = default;
  // Blocks until there are some; 0: the end; nothing: `stop` has become readable. Throws DataError.
  virtual std::optional<std::size_t> read(std::byte* to, std::size_t bytes, int stop) = 0;
};

struct PipeOptions {
  std::string path;     // <channel>_<epoch>
  std::string channel;  // for messages
  std::uint64_t epoch = 0;
  std::chrono::nanoseconds timeout{};  // for the FIFO to exist, a writer to come, and more bytes to come
};

// Opened at the first read, so that waiting for the FIFO can be stopped too. A file in its place is read as well.
class Pipe final : public ByteStream {
 public:
  explicit Pipe(PipeOptions options) : options_(std::move(options)) {}
  std::optional<std::size_t> read(std::byte* to, std::size_t bytes, int stop) override;

 private:
  bool open(int stop);  // false: stopped
  [[noreturn]] void fail(Problem problem, const std::string& text) const;
  std::string limit() const;

  PipeOptions options_;
  Descriptor fifo_;
  std::uint64_t received_ = 0;
};

// What gzip made of the stream `inner`: one or more members. zlib is looked for when it is needed.
std::unique_ptr<ByteStream> inflate(std::unique_ptr<ByteStream> inner, std::string path);

}  // namespace launcher::data

#endif
