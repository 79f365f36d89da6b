#include "lines.h"

#include <algorithm>
#include <string>
#include <utility>

#include "batch.h"
#include "indexed_source.h"

namespace launcher::data {
namespace {

constexpr std::size_t kPiece = std::size_t{4} << 20;         // of a file that is read
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";  // what some programs put before UTF-8

std::string_view characters(std::span<const std::byte> bytes) noexcept {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Calls look(piece) for the whole file from `begin` on, in order, until it returns false.
template <typename Look>
void for_pieces(const File& file, std::uint64_t begin, Look look) {
  Buffer memory(file.mapped() ? 0 : kPiece);
  for (std::uint64_t offset = begin; offset < file.size();) {
    const auto bytes = static_cast<std::size_t>(std::min<std::uint64_t>(kPiece, file.size() - offset));
    const bool more = look(characters(file.view(offset, bytes, memory.data())));
    if (file_faults() != 0) {
      file.check_faults(offset, bytes);
    }
    if (!more) {
      return;
    }
    offset += bytes;
  }
}

std::uint64_t text_begin(const File& file) {
  std::byte memory[kByteOrderMark.size()];
  if (file.size() < kByteOrderMark.size()) {
    return 0;
  }
  return characters(file.view(0, sizeof(memory), memory)) == kByteOrderMark ? kByteOrderMark.size() : 0;
}

bool is_blank(char c) noexcept { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

}  // namespace

LineFramer::Lead LineFramer::lead(std::string_view text) const noexcept {
  for (const char c : text) {
    if (c == rules_.comment && c != '\0') {
      return Lead::comment;
    }
    if (!is_blank(c) || c == rules_.delimiter) {
      return Lead::content;
    }
  }
  return Lead::blank;
}

std::size_t LineFramer::leave_quotes(std::string_view text, std::size_t at) noexcept {
  if (quoted_ == Quoted::perhaps) {
    quoted_ = Quoted::no;
    if (at == text.size() || text[at] != rules_.quote) {
      return at;
    }
    ++at;
  }
  lead_ = Lead::content;
  quoted_ = Quoted::yes;
  while (at < text.size()) {
    const void* found = std::memchr(text.data() + at, rules_.quote, text.size() - at);
    if (found == nullptr) {
      return text.size();
    }
    at = static_cast<std::size_t>(static_cast<const char*>(found) - text.data()) + 1;
    if (at == text.size()) {
      quoted_ = Quoted::perhaps;
      return at;
    }
    if (text[at] != rules_.quote) {
      quoted_ = Quoted::no;
      return at;
    }
    ++at;
  }
  return at;
}

FileIndex scan_lines(const File& file, const LineScan& scan, const std::function<void(std::string_view)>& look) {
  FileIndex index;
  bool header = scan.header;
  const std::uint64_t start = text_begin(file);
  LineFramer framer(scan.rules);
  std::string_view piece;
  std::string before;  // the part of the line that earlier pieces had
  const auto text_of = [&](std::uint64_t begin, std::uint64_t end) {
    const auto until = static_cast<std::size_t>(end - framer.offset());
    if (begin >= framer.offset()) {
      const auto from = static_cast<std::size_t>(begin - framer.offset());
      return piece.substr(from, until - from);
    }
    before += piece.substr(0, until);
    return std::string_view(before);
  };
  const auto found = [&](std::uint64_t begin, std::uint64_t end) {
    if (header) {
      header = false;
      index.set_note(std::string(without_line_end(text_of(begin, end))));
      return;
    }
    index.add(start + begin, end - begin);
    if (look) {
      look(without_line_end(text_of(begin, end)));
    }
  };
  for_pieces(file, start, [&](std::string_view next) {
    piece = next;
    framer.feed(piece, found);
    if (look || header) {
      const std::uint64_t piece_begin = framer.offset() - piece.size();
      if (framer.line_begin() >= piece_begin) {
        before.clear();
      }
      before += piece.substr(static_cast<std::size_t>(std::max(framer.line_begin(), piece_begin) - piece_begin));
    }
    return true;
  });
  piece = {};
  if (!framer.finish(found)) {
    const std::uint64_t begin = start + framer.line_begin();
    const std::string text = "a quoted field of the record that begins here has no closing quote" +
                             line_number(file, begin) +
                             "; repair the file, or read it without quoting if quotes are plain text in it";
    if (!scan.skip) {
      throw DataError(Problem::truncated, file.path(), begin, index.records(), text);
    }
    index.add_damage({begin, file.size() - begin, text});
  }
  return index;
}

std::optional<std::string> first_record(const Index& index) {
  if (index.records() == 0) {
    return std::nullopt;
  }
  const Place place = index.place(0);
  const File& file = *index.files()[place.file];
  const auto bytes = static_cast<std::size_t>(place.bytes);
  Buffer memory(file.mapped() ? 0 : bytes);
  std::string text(without_line_end(file.view(place.offset, bytes, memory.data())));
  if (file_faults() != 0) {
    file.check_faults(place.offset, place.bytes);
  }
  return text;
}

std::string_view without_line_end(std::span<const std::byte> record) noexcept {
  return without_line_end(characters(record));
}

std::string_view without_line_end(std::string_view line) noexcept {
  if (line.ends_with('\n')) {
    line.remove_suffix(1);
    if (line.ends_with('\r')) {
      line.remove_suffix(1);
    }
  }
  return line;
}

std::string line_number(const File& file, std::uint64_t offset) {
  constexpr std::uint64_t kFar = std::uint64_t{1} << 30;  // 0.1 s
  constexpr std::uint64_t kFarToRead = std::uint64_t{64} << 20;
  if (offset > file.size() || offset > (file.mapped() ? kFar : kFarToRead)) {  // the first: a stream's
    return {};
  }
  try {
    std::uint64_t newlines = 0;
    std::uint64_t seen = 0;
    for_pieces(file, 0, [&](std::string_view piece) {
      const auto part = piece.substr(0, static_cast<std::size_t>(std::min<std::uint64_t>(piece.size(), offset - seen)));
      newlines += static_cast<std::uint64_t>(std::count(part.begin(), part.end(), '\n'));
      seen += part.size();
      return seen < offset;
    });
    return " (line " + std::to_string(newlines + 1) + ")";
  } catch (const DataError&) {
    return {};  // what the message is about matters more
  }
}

void LinesCodec::decode(std::span<const std::byte> record, const Place&, const File&, std::size_t row, Batch& batch,
                        State&) const {
  const std::string_view line = without_line_end(record);
  Column& column = batch.columns[0];
  if (!line.empty()) {
    std::memcpy(append(column, row, line.size(), 1), line.data(), line.size());
  }
  column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(line.size());
}

std::shared_ptr<const Source> lines_source(Index index) {
  return std::make_shared<IndexedSource<LinesCodec>>(std::move(index), LinesCodec());
}

}  // namespace launcher::data
