#include "lines.h"

#include <algorithm>

namespace launcher::guardian {

std::string_view last_segment(std::string_view line) {
  while (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  const auto carriage = line.rfind('\r');
  return carriage == std::string_view::npos ? line : line.substr(carriage + 1);
}

std::size_t utf8_cut(std::string_view text, std::size_t limit) {
  if (text.size() <= limit) return text.size();
  std::size_t cut = limit;
  // A continuation byte has 10 as its top bits; a character has at most three of them.
  while (cut > limit - 3 && (static_cast<unsigned char>(text[cut]) & 0xC0U) == 0x80U) --cut;
  return cut;
}

void LineAssembler::emit(std::string_view line, std::string& out) const {
  out.append(prefix_);
  out.append(line);
  out.push_back('\n');
}

std::size_t LineAssembler::emit_line(std::string_view line, std::string& out) {
  std::string_view visible = last_segment(line);
  const bool was_shown = !shown_bar_.empty() && visible == shown_bar_;
  shown_bar_.clear();
  if (was_shown) return 0;
  std::size_t lines = 0;
  do {
    const std::size_t cut = utf8_cut(visible, kMaxLineBytes);
    emit(visible.substr(0, cut), out);
    visible.remove_prefix(cut);
    ++lines;
  } while (!visible.empty());
  return lines;
}

std::size_t LineAssembler::feed(std::string_view bytes, Clock::time_point now, std::string& out) {
  std::size_t lines = 0;
  last_bytes_ = now;
  for (;;) {
    const auto newline = bytes.find('\n');
    if (newline == std::string_view::npos) break;
    if (partial_.empty()) {
      lines += emit_line(bytes.substr(0, newline), out);
    } else {
      partial_.append(bytes.substr(0, newline));
      lines += emit_line(partial_, out);
      partial_.clear();
    }
    bytes.remove_prefix(newline + 1);
  }
  partial_.append(bytes);
  if (partial_.size() > kMaxLineBytes) {
    // A bar that never ends its line keeps its last segment only; a real long line is passed on in pieces.
    const auto carriage = partial_.rfind('\r');
    if (carriage != std::string::npos && carriage + 1 < partial_.size()) partial_.erase(0, carriage + 1);
    while (partial_.size() > kMaxLineBytes) {
      const std::size_t cut = utf8_cut(partial_, kMaxLineBytes);
      emit(std::string_view(partial_).substr(0, cut), out);
      partial_.erase(0, cut);
      ++lines;
    }
  }
  if (now - last_bar_ >= kBarPeriod && partial_.find('\r') != std::string::npos) {
    const std::string_view bar = last_segment(partial_);
    if (!bar.empty() && bar != shown_bar_) {
      shown_bar_ = bar;
      emit(bar, out);
      ++lines;
    }
    last_bar_ = now;
  }
  return lines;
}

std::size_t LineAssembler::flush_idle(Clock::time_point now, std::string& out) {
  if (partial_.empty() || now - last_bytes_ < kIdleFlush) return 0;
  const std::size_t lines = emit_line(partial_, out);
  // What a bar showed last is remembered, so that the newline that ends it adds no second copy.
  if (partial_.find('\r') != std::string::npos) shown_bar_ = last_segment(partial_);
  partial_.clear();
  return lines;
}

std::size_t LineAssembler::finish(std::string& out) {
  if (partial_.empty()) return 0;
  const std::size_t lines = emit_line(partial_, out);
  partial_.clear();
  return lines;
}

}  // namespace launcher::guardian
