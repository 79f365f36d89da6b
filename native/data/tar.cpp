#include "tar.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "near.h"

namespace launcher::data {
namespace {

constexpr std::uint64_t kBlock = 512;
constexpr std::string_view kKeyField = "key";
constexpr std::uint64_t kLongestText = 1 << 20;  // of a long name or a pax header: paths have 4 KiB at most

// Where the fields of a header are (POSIX.1-1988, "ustar Interchange Format").
constexpr std::size_t kName = 0, kNameSize = 100;
constexpr std::size_t kSize = 124, kSizeSize = 12;
constexpr std::size_t kChecksum = 148, kChecksumSize = 8;
constexpr std::size_t kType = 156;
constexpr std::size_t kMagic = 257;
constexpr std::size_t kPrefix = 345, kPrefixSize = 155;

using Block = std::span<const std::byte>;

std::string_view text_at(Block block, std::size_t at, std::size_t size) {
  const char* begin = reinterpret_cast<const char*>(block.data()) + at;
  return {begin, strnlen(begin, size)};
}

bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

// Octal text, or big-endian binary when the first bit is set (GNU). False: neither, or it has more than 63 bits.
bool read_number(Block block, std::size_t at, std::size_t size, std::uint64_t& value) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(block.data()) + at;
  value = 0;
  if ((bytes[0] & 0x80U) != 0) {
    if (bytes[0] != 0x80U) {
      return false;  // negative, or far too large
    }
    for (std::size_t i = 1; i < size; ++i) {
      if (value >> 55 != 0) {
        return false;
      }
      value = value << 8 | bytes[i];
    }
    return true;
  }
  std::size_t i = 0;
  while (i < size && bytes[i] == ' ') {
    ++i;
  }
  for (; i < size && bytes[i] >= '0' && bytes[i] <= '7'; ++i) {
    value = value << 3 | static_cast<std::uint64_t>(bytes[i] - '0');  // 12 digits have 36 bits
  }
  return i == size || bytes[i] == 0 || bytes[i] == ' ';
}

// The sum of all bytes, with the checksum's own as spaces. Some old writers summed signed bytes.
bool checksum_holds(Block block) {
  std::uint64_t wanted = 0;
  if (!read_number(block, kChecksum, kChecksumSize, wanted)) {
    return false;
  }
  std::uint32_t all = 0;
  std::uint32_t negative = 0;
  for (const std::byte byte : block) {
    all += static_cast<std::uint32_t>(byte);
    negative += static_cast<std::uint32_t>(byte) >> 7;
  }
  for (std::size_t i = kChecksum; i < kChecksum + kChecksumSize; ++i) {
    all += static_cast<std::uint32_t>(' ') - static_cast<std::uint32_t>(block[i]);
  }
  return wanted == all || wanted == std::uint64_t{all} - 256U * negative;
}

std::string quoted(std::string_view text) {
  std::string result(1, '"');
  return result.append(text.substr(0, 200)).append(1, '"');
}

bool is_metadata(std::string_view name) {
  const std::string_view first = name.substr(0, name.find('/'));
  return first.size() >= 4 && first.starts_with("__") && first.ends_with("__");
}

void split_name(TarMember& member) {
  const std::string_view name = member.name;
  member.key = member.extension = {};
  const std::size_t slash = name.rfind('/');
  const std::size_t base = slash == std::string_view::npos ? 0 : slash + 1;
  const std::size_t dot = name.find('.', base);
  if (dot == std::string_view::npos || dot == base || dot + 1 == name.size() || is_metadata(name)) {
    return;
  }
  member.key = name.substr(0, dot);
  member.extension = name.substr(dot + 1);
}

void lower(std::string_view text, std::string& out) {
  out.assign(text);
  for (char& c : out) {
    c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  }
}

// Decimal text, with white space around it: what a .cls member holds.
bool to_integer(std::span<const std::byte> bytes, std::int64_t& value) {
  std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto blank = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  while (!text.empty() && blank(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && blank(text.back())) {
    text.remove_suffix(1);
  }
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

bool to_number(std::string_view text, std::uint64_t& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >> 63 == 0;
}

}  // namespace

TarBytes::TarBytes(std::span<const std::byte> bytes, std::uint64_t base, const std::string& path)
    : path_(path), bytes_(bytes), base_(base), end_(base + bytes.size()) {}

TarBytes::TarBytes(const File& file) : path_(file.path()), end_(file.size()), window_(file) {}

std::span<const std::byte> TarBytes::view(std::uint64_t offset, std::size_t count) {
  return window_ ? window_->at(offset, count).first(count)
                 : bytes_.subspan(static_cast<std::size_t>(offset - base_), count);
}

struct TarReader::Extended {
  std::string name;
  bool has_name = false, has_size = false;
  std::uint64_t size = 0;
};

TarReader::TarReader(TarBytes& bytes, std::uint64_t begin, bool archive, std::uint64_t record_)
    : record(record_), bytes_(bytes), offset_(begin), archive_(archive) {}

void TarReader::fail(Problem problem, std::uint64_t offset, const std::string& text) const {
  throw DataError(problem, bytes_.path(), offset, record, text);
}

void TarReader::check_rest_is_zero(std::uint64_t offset) {
  while (offset < bytes_.end()) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(Window::kBlockBytes, bytes_.end() - offset));
    if (!all_zero(bytes_.view(offset, count))) {
      fail(Problem::malformed, offset,
           "data follow the end of the archive; archives that were put one after the other must be kept apart");
    }
    offset += count;
  }
}

// Whether no member comes at offset_.
bool TarReader::at_end() {
  const std::uint64_t rest = bytes_.end() - offset_;
  if (rest == 0) {
    if (archive_) {
      fail(Problem::truncated, offset_,
           "the archive has no end: its two last blocks of zeros are missing, it was cut or not closed; copy it again");
    }
    return true;
  }
  if (rest < kBlock) {
    fail(Problem::truncated, offset_,
         "truncated header: " + std::to_string(rest) + " bytes, a tar header has 512; copy the archive again");
  }
  if (!all_zero(bytes_.view(offset_, kBlock))) {
    return false;
  }
  check_rest_is_zero(offset_ + kBlock);
  return true;
}

std::string TarReader::text_of(std::uint64_t offset, std::uint64_t size) {
  if (size > kLongestText) {
    fail(Problem::malformed, offset, "an extended header of " + std::to_string(size) + " bytes; 1 MiB is the limit");
  }
  const auto bytes = bytes_.view(offset, static_cast<std::size_t>(size));
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Records "<length> <key>=<value>\n", the length counting itself.
void TarReader::read_pax(const std::string& text, std::uint64_t offset, Extended& extended) const {
  std::string_view rest = text;
  while (!rest.empty() && rest.front() != '\0') {
    const std::size_t space = rest.find(' ');
    std::uint64_t length = 0;
    if (space == std::string_view::npos || !to_number(rest.substr(0, space), length) || length > rest.size() ||
        length < space + 2 || rest[length - 1] != '\n') {
      fail(Problem::malformed, offset, "a pax header whose records do not hold together");
    }
    const std::string_view entry = rest.substr(space + 1, length - space - 2);
    const std::size_t equals = entry.find('=');
    const std::string_view key = entry.substr(0, equals);
    if (equals == std::string_view::npos) {
      fail(Problem::malformed, offset, "a pax header with a record that has no \"=\"");
    }
    const std::string_view value = entry.substr(equals + 1);
    if (key == "path") {
      extended.name = value;
      extended.has_name = true;
    } else if (key == "size") {
      if (!to_number(value, extended.size)) {
        fail(Problem::malformed, offset, "a pax header with size " + quoted(value) + "; a decimal number was expected");
      }
      extended.has_size = true;
    } else if (key.starts_with("GNU.sparse.")) {
      fail(Problem::malformed, offset, "a sparse member; make the archive without tar's --sparse");
    }
    rest.remove_prefix(length);
  }
}

bool TarReader::next(TarMember& member) {
  Extended extended;
  member.begin = offset_;
  while (true) {
    if (at_end()) {
      if (member.begin != offset_) {
        fail(Problem::malformed, member.begin, "an extended header that no member follows");
      }
      return false;
    }
    const Block block = bytes_.view(offset_, kBlock);
    if (!checksum_holds(block)) {
      fail(Problem::malformed, offset_, "no tar header: its checksum does not hold");
    }
    std::uint64_t size = 0;
    if (!read_number(block, kSize, kSizeSize, size)) {
      fail(Problem::malformed, offset_, "a tar header whose size is no number");
    }
    const char type = static_cast<char>(block[kType]);
    const bool describes_next = type == 'x' || type == 'L' || type == 'K' || type == 'g';
    if (!describes_next && extended.has_size) {
      size = extended.size;
    }
    // Links and devices have no data, whatever their size says.
    const bool has_data = !(type >= '1' && type <= '6');
    const std::uint64_t data = offset_ + kBlock;
    const std::uint64_t available = bytes_.end() - data;
    const std::uint64_t stored = has_data ? size : 0;
    if (stored > available) {
      fail(Problem::truncated, member.begin,
           "the archive ends inside a member: " + std::to_string(stored) + " bytes wanted, " +
               std::to_string(available) + " there; copy it again");
    }
    // The last padding may be missing where the file ends without it.
    const std::uint64_t end = data + std::min(available, (stored + kBlock - 1) / kBlock * kBlock);
    if (type == 'S') {
      fail(Problem::malformed, offset_, "a sparse member; make the archive without tar's --sparse");
    }
    if (type == 'L') {
      extended.name = text_of(data, size);
      extended.name.resize(strnlen(extended.name.data(), extended.name.size()));
      extended.has_name = true;
    } else if (type == 'x') {
      read_pax(text_of(data, size), data, extended);
    } else if (type == 'g') {
      Extended global;
      read_pax(text_of(data, size), data, global);
      if (global.has_name || global.has_size) {
        fail(Problem::malformed, offset_, "a global pax header that names or sizes all members; make the archive anew");
      }
    } else if (type != 'K') {
      if (extended.has_name) {
        member.name = std::move(extended.name);
      } else {
        member.name.clear();
        if (text_at(block, kMagic, 6) == "ustar" && block[kPrefix] != std::byte{0}) {
          member.name.assign(text_at(block, kPrefix, kPrefixSize)).push_back('/');
        }
        member.name.append(text_at(block, kName, kNameSize));
      }
      // In archives older than ustar a folder is a file whose name ends in a slash.
      member.regular = (type == '0' || type == '\0' || type == '7') && !member.name.ends_with('/');
      member.data = data;
      member.size = stored;
      member.end = end;
      split_name(member);
      offset_ = end;
      return true;
    }
    offset_ = end;
  }
}

std::vector<std::string> tar_extensions(const Index& index) {
  std::vector<std::string> extensions;
  if (index.records() == 0) {
    return extensions;
  }
  const Place place = index.place(0);
  const File& file = *index.files()[place.file];
  Buffer memory(file.mapped() ? 0 : static_cast<std::size_t>(place.bytes));
  const auto record = file.view(place.offset, static_cast<std::size_t>(place.bytes), memory.data());
  TarBytes bytes(record, place.offset, file.path());
  TarReader reader(bytes, place.offset, false, place.number);
  TarMember member;
  while (reader.next(member)) {
    if (member.regular && !member.key.empty()) {
      lower(member.extension, extensions.emplace_back());
    }
  }
  return extensions;
}

TarCodec::TarCodec(std::vector<TarField> wanted, bool exact) : wanted_(std::move(wanted)), exact_(exact) {
  for (const TarField& field : wanted_) {
    if (std::any_of(fields_.begin(), fields_.end(), [&](const Field& one) { return one.name == field.name; })) {
      throw std::invalid_argument("two fields would be called \"" + field.name +
                                  "\" (\"key\" is the sample's name); name the fields that you want");
    }
    fields_.push_back(field.integer ? Field{field.name, Kind::fixed, DType::int64, {}}
                                    : Field{field.name, Kind::ragged, DType::uint8, {}});
  }
}

void TarCodec::decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row,
                      Batch& batch, State& state) const {
  const auto fail = [&](std::uint64_t offset, const std::string& text) {
    throw DataError(Problem::mismatch, file.path(), offset, place.number, text);
  };
  state.found.assign(wanted_.size(), {});
  state.seen.assign(wanted_.size(), 0);
  TarBytes bytes(record, place.offset, file.path());
  TarReader reader(bytes, place.offset, false, place.number);
  while (reader.next(state.member)) {
    const TarMember& member = state.member;
    if (!member.regular || member.key.empty()) {
      continue;
    }
    lower(member.extension, state.extension);
    bool known = false;
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      if (wanted_[i].name == kKeyField) {
        state.key.assign(member.key);
        state.found[i] = std::as_bytes(std::span(state.key));
        state.seen[i] = 1;
      } else if (wanted_[i].name == state.extension) {
        if (state.seen[i] != 0) {
          fail(member.begin, "the sample has two members " + quoted(member.name));
        }
        state.seen[i] = 1;
        state.found[i] =
            record.subspan(static_cast<std::size_t>(member.data - place.offset), static_cast<std::size_t>(member.size));
        known = true;
      }
    }
    if (!known && exact_) {
      fail(member.begin, "member " + quoted(member.name) +
                             " has an extension that the first sample lacks; name the fields that all samples have");
    }
  }
  state.integers.assign(wanted_.size(), 0);
  for (std::size_t i = 0; i < wanted_.size(); ++i) {
    if (state.seen[i] == 0) {
      fail(place.offset, "the sample has no member with extension " + quoted(wanted_[i].name) +
                             "; name the fields that all samples have");
    }
    if (wanted_[i].integer && !to_integer(state.found[i], state.integers[i])) {
      fail(place.offset, "the member with extension " + quoted(wanted_[i].name) + " is no decimal integer of 64 bits");
    }
  }
  for (std::size_t i = 0; i < wanted_.size(); ++i) {
    Column& column = batch.columns[i];
    if (wanted_[i].integer) {
      column.fixed_row<std::int64_t>(row, 1)[0] = state.integers[i];
      continue;
    }
    const std::span<const std::byte> bytes_of_field = state.found[i];
    std::byte* to = append(column, row, bytes_of_field.size(), 1);
    copy_near(to, bytes_of_field.data(), bytes_of_field.size());
    column.offsets[row + 1] = column.offsets[row] + static_cast<std::int64_t>(bytes_of_field.size());
  }
}

std::shared_ptr<const Source> tar_source(Index index, std::vector<TarField> wanted, bool exact) {
  return std::make_shared<IndexedSource<TarCodec>>(std::move(index), TarCodec(std::move(wanted), exact));
}

}  // namespace launcher::data
