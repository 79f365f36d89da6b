#include "sidecar.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <unordered_map>

#include "batch.h"
#include "checksum.h"
#include "launcher/descriptor.h"

// The layout, in the byte order of the machine (a sidecar never leaves it):
//   header   64 bytes
//   arrays   of each file, each array from a multiple of 8 on
//   table    key, number of files, and for each of them name, size, time, records, ..., where its arrays are
// Each text of the table is its length (64 bits) and its bytes.

namespace launcher::data {
namespace {

struct Header {
  std::array<char, 8> magic;
  std::uint32_t version;
  std::uint32_t byte_order;
  std::uint64_t total_bytes;
  std::uint64_t table_offset;
  std::uint64_t table_bytes;
  std::uint64_t table_checksum;
  std::uint64_t reserved;
  std::uint64_t header_checksum;  // of all before it
};
static_assert(sizeof(Header) == 64);

constexpr std::array<char, 8> kMagic = {'L', 'D', 'I', 'N', 'D', 'E', 'X', '\n'};
constexpr std::uint32_t kByteOrder = 0x01020304;
constexpr std::uint64_t kAlignment = 8;

enum Form : std::uint64_t { kContiguous = 0, kApart = 1, kWide = 2 };  // which arrays there are

std::uint64_t aligned(std::uint64_t bytes) noexcept { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

template <typename T>
std::span<const std::byte> bytes_of(const T* begin, std::uint64_t count) noexcept {
  return std::as_bytes(std::span<const T>(begin, static_cast<std::size_t>(count)));
}

std::uint64_t blocks_of(std::uint64_t records) noexcept {
  return records / Spans::kBlock + (records % Spans::kBlock != 0 ? 1 : 0);
}

// --- writing -------------------------------------------------------------------------------------------------------

class Writer {
 public:
  // One writer at a time, by the lock that the caller holds: so there is never more than one of these left behind.
  explicit Writer(const std::string& path) : path_(path), temporary_(path + ".tmp") {
    file_ = Descriptor(open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
    if (!file_) {
      fail();
    }
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  ~Writer() {
    if (!done_) {
      unlink(temporary_.c_str());
    }
  }

  std::uint64_t written() const noexcept { return written_; }

  void write(std::span<const std::byte> bytes) {
    put(bytes, written_);
    written_ += bytes.size();
    const std::array<std::byte, kAlignment> zeros{};
    const std::uint64_t pad = aligned(written_) - written_;
    put({zeros.data(), static_cast<std::size_t>(pad)}, written_);
    written_ += pad;
  }

  void finish(const Header& header) {
    put(bytes_of(&header, 1), 0);
    if (rename(temporary_.c_str(), path_.c_str()) != 0) {
      fail();
    }
    done_ = true;
  }

 private:
  [[noreturn]] void fail() const {
    throw DataError(Problem::unreadable, path_, kNowhere, kNowhere,
                    "can not be written: " + std::generic_category().message(errno));
  }

  void put(std::span<const std::byte> bytes, std::uint64_t offset) {
    while (!bytes.empty()) {
      const ssize_t wrote = pwrite(file_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
      if (wrote < 0 && errno != EINTR) {
        fail();
      }
      if (wrote > 0) {
        bytes = bytes.subspan(static_cast<std::size_t>(wrote));
        offset += static_cast<std::uint64_t>(wrote);
      }
    }
  }

  const std::string& path_;
  std::string temporary_;
  Descriptor file_;
  std::uint64_t written_ = 0;
  bool done_ = false;
};

class Table {
 public:
  void add(std::uint64_t number) {
    const auto bytes = bytes_of(&number, 1);
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  void add(std::string_view text) {
    add(text.size());
    const auto bytes = bytes_of(text.data(), text.size());
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

Form form_of(const Spans& spans) noexcept {
  return spans.wide != nullptr ? kWide : spans.lengths != nullptr ? kApart : kContiguous;
}

void add_file(Writer& writer, Table& table, const Entry& entry, const FileIndex& part) {
  const Spans spans = part.spans();
  const Form form = form_of(spans);
  table.add(entry.path);
  table.add(entry.size);
  table.add(static_cast<std::uint64_t>(entry.modified_ns));
  table.add(spans.records);
  table.add(spans.end);
  table.add(form);
  table.add(writer.written());
  std::uint64_t sum = 0;
  const auto put = [&](std::span<const std::byte> array) {
    sum = sum * 3 + checksum(array);
    writer.write(array);
  };
  if (form == kWide) {
    put(bytes_of(spans.wide, 2 * spans.records));
  } else {
    put(bytes_of(spans.bases, blocks_of(spans.records)));
    put(bytes_of(spans.deltas, spans.records));
    if (form == kApart) {
      put(bytes_of(spans.lengths, spans.records));
    }
  }
  table.add(sum);
  table.add(part.note());
  table.add(part.damage().size());
  for (const Damage& damage : part.damage()) {
    table.add(damage.offset);
    table.add(damage.bytes);
    table.add(damage.text);
  }
}

// --- reading -------------------------------------------------------------------------------------------------------

class Reader {
 public:
  Reader(const std::string& path, std::span<const std::byte> bytes) : path_(path), bytes_(bytes) {}

  [[noreturn]] void fail(const std::string& text) const {
    throw DataError(Problem::malformed, path_, kNowhere, kNowhere, text + "; the data is indexed again");
  }

  std::span<const std::byte> range(std::uint64_t offset, std::uint64_t bytes) const {
    if (offset > bytes_.size() || bytes > bytes_.size() - offset) {
      fail("the index sidecar is damaged: it points outside itself");
    }
    return bytes_.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(bytes));
  }

  // Of the table, from here on.
  void begin(std::uint64_t offset, std::uint64_t end) {
    at_ = offset;
    end_ = end;
  }
  std::uint64_t number() {
    std::uint64_t value = 0;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view text() {
    const std::uint64_t size = number();
    const auto bytes = take(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  // `count` values of the arrays that begin at `offset`, which goes past them.
  template <typename T>
  const T* array(std::uint64_t& offset, std::uint64_t count, std::uint64_t& sum) const {
    if (count > bytes_.size() / sizeof(T) || offset % kAlignment != 0) {
      fail("the index sidecar is damaged: an array of it is out of bounds");
    }
    const auto bytes = range(offset, count * sizeof(T));
    sum = sum * 3 + checksum(bytes);
    offset = aligned(offset + bytes.size());
    return reinterpret_cast<const T*>(bytes.data());  // the mapping or allocation is aligned, and so is the offset
  }

 private:
  std::span<const std::byte> take(std::uint64_t bytes) {
    if (bytes > end_ - at_) {
      fail("the index sidecar is damaged: its table is cut");
    }
    const auto result = range(at_, bytes);
    at_ += bytes;
    return result;
  }

  const std::string& path_;
  std::span<const std::byte> bytes_;
  std::uint64_t at_ = 0, end_ = 0;
};

// Whether no record leaves the part of the file that the index is of.
bool within(const Spans& spans, std::uint64_t size) noexcept {
  bool good = spans.end <= size;
  if (spans.wide != nullptr) {
    for (std::uint64_t i = 0; i < spans.records; ++i) {
      good = good && spans.wide[2 * i] <= spans.end && spans.wide[2 * i + 1] <= spans.end - spans.wide[2 * i];
    }
    return good;
  }
  std::uint64_t before = 0;
  for (std::uint64_t i = 0; i < spans.records; ++i) {
    const std::uint64_t base = spans.bases[i / Spans::kBlock];
    const std::uint64_t offset = base + spans.deltas[i];
    const std::uint64_t bytes = spans.lengths != nullptr ? spans.lengths[i] : 0;
    good = good && offset >= base && offset >= before && offset <= spans.end && bytes <= spans.end - offset;
    before = offset;
  }
  return good;
}

FileIndex read_file(Reader& reader, const Entry& entry, const std::shared_ptr<const File>& sidecar, bool wanted) {
  Spans spans;
  spans.records = reader.number();
  spans.end = reader.number();
  const std::uint64_t form = reader.number();
  std::uint64_t offset = reader.number();
  const std::uint64_t expected = reader.number();
  const std::string_view note = reader.text();
  std::vector<Damage> damage;
  for (std::uint64_t left = reader.number(); left != 0; --left) {
    const std::uint64_t begin = reader.number();
    const std::uint64_t bytes = reader.number();
    damage.push_back({begin, bytes, std::string(reader.text())});
  }
  if (!wanted) {
    return {};
  }
  std::uint64_t sum = 0;
  if (form == kWide) {
    if (spans.records > ~std::uint64_t{0} / 2) {
      reader.fail("the index sidecar is damaged: it has more records than bytes");
    }
    spans.wide = reader.array<std::uint64_t>(offset, 2 * spans.records, sum);
  } else if (form == kContiguous || form == kApart) {
    spans.bases = reader.array<std::uint64_t>(offset, blocks_of(spans.records), sum);
    spans.deltas = reader.array<std::uint32_t>(offset, spans.records, sum);
    if (form == kApart) {
      spans.lengths = reader.array<std::uint32_t>(offset, spans.records, sum);
    }
  } else {
    reader.fail("the index sidecar is damaged: it has arrays of a form that does not exist");
  }
  if (sum != expected || !within(spans, entry.size)) {
    reader.fail("the index sidecar is damaged: its arrays are not what was written");
  }
  FileIndex part(spans, sidecar);
  part.set_note(std::string(note));
  for (Damage& one : damage) {
    part.add_damage(std::move(one));
  }
  return part;
}

Header read_header(const Reader& reader, std::uint64_t size) {
  Header header;
  if (size < sizeof header) {
    reader.fail("the index sidecar is cut");
  }
  const auto bytes = reader.range(0, sizeof header);
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != kMagic || header.byte_order != kByteOrder) {
    reader.fail("this is no index sidecar");
  }
  if (header.version != kSidecarVersion) {
    reader.fail("the index sidecar is of version " + std::to_string(header.version) + ", this is version " +
                std::to_string(kSidecarVersion));
  }
  if (header.header_checksum != checksum(bytes.first(sizeof header - sizeof header.header_checksum)) ||
      header.total_bytes != size ||
      header.table_checksum != checksum(reader.range(header.table_offset, header.table_bytes))) {
    reader.fail("the index sidecar is damaged: its header or table is not what was written");
  }
  return header;
}

}  // namespace

void save_index(const std::string& path, const std::string& key, const std::vector<Entry>& files,
                const std::vector<std::shared_ptr<const FileIndex>>& parts) {
  if (files.size() != parts.size()) {
    throw std::invalid_argument("an index has one part for each file");
  }
  Writer writer(path);
  Header header{};
  writer.write(bytes_of(&header, 1));
  Table table;
  table.add(key);
  table.add(files.size());
  for (std::size_t i = 0; i < files.size(); ++i) {
    add_file(writer, table, files[i], *parts[i]);
  }
  header.magic = kMagic;
  header.version = kSidecarVersion;
  header.byte_order = kByteOrder;
  header.table_offset = writer.written();
  header.table_bytes = table.bytes().size();
  header.table_checksum = checksum(table.bytes());
  writer.write(table.bytes());
  header.total_bytes = writer.written();
  header.header_checksum = checksum(bytes_of(&header, 1).first(sizeof header - sizeof header.header_checksum));
  writer.finish(header);
}

std::vector<std::optional<FileIndex>> load_index(const std::string& path, const std::string& key,
                                                 const std::vector<Entry>& files, bool any_time) {
  auto sidecar = std::make_shared<const File>(path);
  Buffer memory;
  std::span<const std::byte> bytes = sidecar->contents();
  if (!sidecar->mapped()) {
    memory.reserve(static_cast<std::size_t>(sidecar->size()), 0);
    bytes = sidecar->view(0, static_cast<std::size_t>(sidecar->size()), memory.data());
  }
  Reader reader(path, bytes);
  const Header header = read_header(reader, sidecar->size());
  reader.begin(header.table_offset, header.table_offset + header.table_bytes);
  if (reader.text() != key) {
    reader.fail("the index sidecar is for another format or other options");
  }
  std::unordered_map<std::string_view, std::size_t> wanted;
  for (std::size_t i = 0; i < files.size(); ++i) {
    wanted.emplace(files[i].path, i);
  }
  std::vector<std::optional<FileIndex>> parts(files.size());
  for (std::uint64_t left = reader.number(); left != 0; --left) {
    const auto found = wanted.find(reader.text());
    const std::uint64_t size = reader.number();
    const auto modified_ns = static_cast<std::int64_t>(reader.number());
    const bool same = found != wanted.end() && files[found->second].size == size &&
                      (any_time || files[found->second].modified_ns == modified_ns);
    FileIndex part =
        read_file(reader, same ? files[found->second] : Entry{}, sidecar->mapped() ? sidecar : nullptr, same);
    if (same) {
      parts[found->second] = std::move(part);
    }
  }
  sidecar->check_faults();
  return parts;
}

}  // namespace launcher::data
