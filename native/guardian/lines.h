// Turns the raw bytes of one stream of one rank into whole, prefixed lines for the console.
//
// Words used here: a *line* ends with '\n'; a *segment* of a line ends with '\r' (a progress bar rewrites itself that
// way). The console gets the last segment only. Bytes are passed on as they are: nothing is decoded, so invalid UTF-8
// survives, and a line above kMaxLineBytes is cut only between UTF-8 characters.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>

namespace launcher::guardian {

inline constexpr std::size_t kMaxLineBytes = 64U * 1024U;

class LineAssembler {
 public:
  using Clock = std::chrono::steady_clock;
  // A prompt or half a line that stays unfinished this long is shown as it is.
  static constexpr std::chrono::milliseconds kIdleFlush{1000};
  // A progress bar is shown at most this often.
  static constexpr std::chrono::milliseconds kBarPeriod{2000};

  explicit LineAssembler(std::string prefix) : prefix_(std::move(prefix)) {}

  // Consumes `bytes` and appends the whole lines they complete to `out`. Returns the number of lines appended.
  std::size_t feed(std::string_view bytes, Clock::time_point now, std::string& out);
  // Appends what has been unfinished for too long, at the time `now`.
  std::size_t flush_idle(Clock::time_point now, std::string& out);
  // Appends whatever is left: the stream has ended.
  std::size_t finish(std::string& out);
  [[nodiscard]] bool has_partial() const { return !partial_.empty(); }

 private:
  void emit(std::string_view line, std::string& out) const;
  std::size_t emit_line(std::string_view line, std::string& out);

  std::string prefix_;
  std::string partial_;
  std::string shown_bar_;
  Clock::time_point last_bytes_{};
  Clock::time_point last_bar_{};
};

// The visible part of a line without its newline: what follows the last '\r' that is not its end.
std::string_view last_segment(std::string_view line);

// The largest n <= limit such that text[0, n) does not end inside a UTF-8 character.
std::size_t utf8_cut(std::string_view text, std::size_t limit);

}  // namespace launcher::guardian
