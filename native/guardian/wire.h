// Frames between the supervisor (Python) and the guardian, over two pipes of one host.
//
// A frame is a little-endian u32 length followed by that many bytes: fields separated by NUL, the first of them the
// verb. Arguments and environment entries cannot contain NUL (execve), so no escaping is needed; text taken from a
// rank's output has its NULs replaced before it is sent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace launcher::guardian {

// Linux caps argv + envp at a quarter of the stack limit, 6 MiB in practice; twice that leaves room for paths.
inline constexpr std::size_t kMaxFrameBytes = 16U * 1024U * 1024U;

using Fields = std::vector<std::string>;

// Appends one frame made of `fields` to `out`.
void append_frame(std::string& out, const Fields& fields);

// Text made safe as one field: NUL becomes '?'.
std::string as_field(std::string_view text);

// Decodes a byte stream into frames.
class FrameReader {
 public:
  void feed(std::string_view bytes) { buffer_.append(bytes); }
  // The next whole frame, or nullopt when more bytes are needed.
  // Throws std::length_error when the peer announces a frame above kMaxFrameBytes.
  std::optional<Fields> next();

 private:
  std::string buffer_;
  std::size_t offset_ = 0;
};

// Walks the fields of a command with checks. Throws std::invalid_argument naming the command and the field.
class FieldCursor {
 public:
  explicit FieldCursor(const Fields& fields) : fields_(fields) {}
  const std::string& text(const char* name);
  long number(const char* name);
  std::vector<std::string> list(const char* name);  // a count, then that many fields

 private:
  const Fields& fields_;
  std::size_t index_ = 0;
};

}  // namespace launcher::guardian
