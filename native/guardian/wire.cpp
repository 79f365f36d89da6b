#include "wire.h"

#include <charconv>
#include <stdexcept>

namespace launcher::guardian {

void append_frame(std::string& out, const Fields& fields) {
  std::size_t length = fields.empty() ? 0 : fields.size() - 1;
  for (const auto& field : fields) length += field.size();
  const auto size = static_cast<std::uint32_t>(length);
  for (unsigned shift = 0; shift < 32; shift += 8) out.push_back(static_cast<char>((size >> shift) & 0xFFU));
  for (std::size_t i = 0; i < fields.size(); ++i) {
    if (i != 0) out.push_back('\0');
    out.append(fields[i]);
  }
}

std::string as_field(std::string_view text) {
  std::string safe(text);
  for (char& c : safe) {
    if (c == '\0') c = '?';
  }
  return safe;
}

std::optional<Fields> FrameReader::next() {
  const std::size_t available = buffer_.size() - offset_;
  if (available < 4) return std::nullopt;
  std::uint32_t size = 0;
  for (unsigned i = 0; i < 4; ++i) {
    size |= static_cast<std::uint32_t>(static_cast<unsigned char>(buffer_[offset_ + i])) << (8U * i);
  }
  if (size > kMaxFrameBytes) throw std::length_error("frame of " + std::to_string(size) + " bytes is above the limit");
  if (available - 4 < size) return std::nullopt;
  Fields fields;
  std::string_view body(buffer_.data() + offset_ + 4, size);
  for (;;) {
    const auto end = body.find('\0');
    fields.emplace_back(body.substr(0, end));
    if (end == std::string_view::npos) break;
    body.remove_prefix(end + 1);
  }
  offset_ += 4U + size;
  if (offset_ == buffer_.size()) {
    buffer_.clear();
    offset_ = 0;
  }
  return fields;
}

const std::string& FieldCursor::text(const char* name) {
  if (index_ >= fields_.size()) {
    const std::string verb = fields_.empty() ? "?" : fields_.front();
    throw std::invalid_argument("command '" + verb + "' lacks field '" + name + "'");
  }
  return fields_[index_++];
}

long FieldCursor::number(const char* name) {
  const std::string& field = text(name);
  long value = 0;
  const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
  if (error != std::errc{} || end != field.data() + field.size()) {
    throw std::invalid_argument("command '" + fields_.front() + "': field '" + name + "' is not a number: " + field);
  }
  return value;
}

std::vector<std::string> FieldCursor::list(const char* name) {
  const long count = number(name);
  if (count < 0 || static_cast<std::size_t>(count) > fields_.size() - index_) {
    throw std::invalid_argument("command '" + fields_.front() + "': list '" + name + "' is longer than the frame");
  }
  std::vector<std::string> items;
  items.reserve(static_cast<std::size_t>(count));
  for (long i = 0; i < count; ++i) items.push_back(text(name));
  return items;
}

}  // namespace launcher::guardian
