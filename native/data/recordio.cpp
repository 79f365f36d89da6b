#include "recordio.h"

#include <algorithm>
#include <utility>

#include "window.h"

namespace launcher::data {
namespace {

constexpr std::uint32_t kPad = 4;
constexpr std::uint64_t kAhead = 16;  // records
// Pages are mapped so far ahead where records are so short that most pages have a header.
constexpr std::uint64_t kPopulateBytes = 16 << 20;
constexpr std::uint64_t kShortBytes = 8 << 10;
constexpr int kProof = 3;  // records that must follow each other for a header to be taken for one, after damage

constexpr std::uint64_t padded(std::uint64_t bytes) { return (bytes + kPad - 1) / kPad * kPad; }

struct Words {
  std::uint32_t magic, flag, length;
};

Words words_of(const std::byte* header) noexcept {
  std::uint32_t magic, word;
  std::memcpy(&magic, header, sizeof(magic));
  std::memcpy(&word, header + sizeof(magic), sizeof(word));
  return {magic, word >> 29, word & kMaxPartBytes};
}

// `header(at)` gives the 8 bytes at `at`, counted from the record's begin, of which `size` are there.
template <typename Header>
Frames walk(std::uint64_t size, bool complete, Header header) {
  Frames frames;
  std::uint64_t at = 0;
  const auto fail = [&](FrameFault fault) {
    frames.fault = fault;
    frames.bytes = at;
    return frames;
  };
  const auto lacks = [&](FrameFault fault, std::uint64_t wanted) {
    if (complete) {
      return fail(fault);
    }
    frames.more = true;
    frames.bytes = wanted;
    return frames;
  };
  for (;;) {
    if (size - at < kFrameHeaderBytes) {
      const bool between = frames.parts != 0 && size == at;
      return lacks(between ? FrameFault::parts : FrameFault::header, at + kFrameHeaderBytes);
    }
    const Words words = words_of(header(at));
    if (words.magic != kRecordMagic) {
      frames.found = words.magic;
      return fail(FrameFault::magic);
    }
    if (words.flag > 3 || (frames.parts == 0) != (words.flag < 2)) {
      frames.found = words.flag;
      return fail(words.flag > 3 ? FrameFault::flag : FrameFault::sequence);
    }
    const std::uint64_t whole = kFrameHeaderBytes + padded(words.length);
    if (size - at < kFrameHeaderBytes + words.length) {
      frames.wanted = words.length;
      return lacks(FrameFault::payload, at + whole);
    }
    if (size - at < whole && !complete) {
      return lacks(FrameFault::payload, at + whole);
    }
    ++frames.parts;
    frames.payload += words.length;
    at += std::min(whole, size - at);
    if (words.flag == 0 || words.flag == 3) {
      frames.bytes = at;
      return frames;
    }
    frames.plain = frames.plain || words.length % kPad != 0;
  }
}

Frames frames_at(Window& window, std::uint64_t begin) {
  return walk(window.size() - begin, true,
              [&](std::uint64_t at) { return window.at(begin + at, kFrameHeaderBytes).data(); });
}

// From `begin` on, kProof records follow each other, or fewer up to the end of the file exactly.
bool holds(Window& window, std::uint64_t begin) {
  for (int record = 0; record < kProof && (record == 0 || begin < window.size()); ++record) {
    const Frames frames = frames_at(window, begin);
    if (!frames.whole()) {
      return false;
    }
    begin += frames.bytes;
  }
  return true;
}

// The first place at or after `begin` where records begin again; the end of the file if there is none.
std::uint64_t resynchronise(Window& window, std::uint64_t begin) {
  const std::uint32_t magic = kRecordMagic;
  while (window.size() - begin >= kFrameHeaderBytes) {
    const auto view = window.at(begin, kFrameHeaderBytes);
    const void* found = memmem(view.data(), view.size(), &magic, sizeof(magic));
    if (found == nullptr) {
      begin += view.size() - (sizeof(magic) - 1);  // it may begin in this view and end in the next
      continue;
    }
    begin += static_cast<std::uint64_t>(static_cast<const std::byte*>(found) - view.data());
    if (holds(window, begin)) {
      return begin;
    }
    ++begin;
  }
  return window.size();
}

std::string name_of(std::uint32_t flag) {
  static constexpr const char* names[] = {"0 (a whole record)", "1 (a first part)", "2 (a middle part)",
                                          "3 (a last part)"};
  return flag < 4 ? names[flag] : std::to_string(flag);
}

std::string hexadecimal(std::uint32_t word) {
  std::string digits(8, '0');
  for (auto digit = digits.rbegin(); word != 0; ++digit, word >>= 4) {
    *digit = "0123456789abcdef"[word & 15];
  }
  return "0x" + digits;
}

constexpr const char* kCut =
    "the file was cut, or not copied whole; copy it again, or leave the record out (on_bad=skip)";

std::string explain(const Frames& frames, std::uint64_t available) {
  switch (frames.fault) {
    case FrameFault::header:
      return "truncated header: found " + std::to_string(available) + " bytes to the end of the file, wanted " +
             std::to_string(kFrameHeaderBytes) + "; " + kCut;
    case FrameFault::payload:
      return "truncated payload: the header tells of " + std::to_string(frames.wanted) + " bytes, found " +
             std::to_string(available - kFrameHeaderBytes) + " to the end of the file; " + kCut;
    case FrameFault::parts:
      return "the file ends after part " + std::to_string(frames.parts) + " of a record whose last part is missing; " +
             kCut;
    case FrameFault::magic:
      return "found " + hexadecimal(frames.found) + " where a frame must begin with the magic " +
             hexadecimal(kRecordMagic) + "; this is no RecordIO, or it is damaged before or at this place";
    case FrameFault::flag:
      return "found flag " + name_of(frames.found) + ", which no writer writes; wanted 0 to 3; the header is damaged";
    case FrameFault::sequence:
      return "found flag " + name_of(frames.found) + ", wanted " +
             (frames.parts == 0 ? "0 (a whole record) or 1 (a first part)" : "2 (a middle part) or 3 (a last part)") +
             "; a part of this record is missing";
    case FrameFault::none:
      break;
  }
  return "no fault";
}

bool is_truncated(FrameFault fault) {
  return fault == FrameFault::header || fault == FrameFault::payload || fault == FrameFault::parts;
}

[[noreturn]] void refuse_plain(const File& file, std::uint64_t offset, std::uint64_t record) {
  throw DataError(Problem::malformed, file.path(), offset, record,
                  "a part that is not the last has a length that is no multiple of 4, which the dialect 'dmlc' does "
                  "not have; read it with dialect 'plain' or 'auto'");
}

// Finds records, and holds the last one back until what follows it is known to be a record too: where it is not, the
// length of that last one may be what is wrong.
class Scan {
 public:
  Scan(const File& file, Dialect dialect, bool skip) : file_(file), window_(file), dialect_(dialect), skip_(skip) {}

  FileIndex run() {
    while (at_ < file_.size()) {
      if (file_.mapped() && scan_single(file_.contents())) {
        break;
      }
      const Frames frames = frames_at(window_, at_);
      if (frames.whole()) {
        if (frames.plain && dialect_ == Dialect::dmlc) {
          refuse_plain(file_, at_, number());
        }
        add(frames.bytes);
      } else {
        leave_out(frames);
      }
    }
    flush();
    return std::move(index_);
  }

 private:
  std::uint64_t number() const noexcept { return index_.records() + (held_ != 0 ? 1 : 0); }

  void flush() {
    if (held_ != 0) {
      index_.add(at_ - held_, held_);
      held_ = 0;
    }
  }

  void add(std::uint64_t bytes) {
    flush();
    at_ += bytes;
    held_ = bytes;
  }

  // The records of one frame, as far as they go; true: to the end of the file.
  bool scan_single(std::span<const std::byte> contents) {
    const std::uint64_t size = contents.size();
    while (size - at_ >= kFrameHeaderBytes) {
      const auto length = single_frame(contents.subspan(static_cast<std::size_t>(at_)));
      if (!length) {
        return false;
      }
      const std::uint64_t bytes = std::min(kFrameHeaderBytes + padded(*length), size - at_);
      if (at_ >= populated_) {
        populated_ = at_ + kPopulateBytes;
        if (bytes <= kShortBytes) {
          file_.populate(at_, kPopulateBytes);
        }
      }
      // Most records are as long as their neighbours: then this is where a header is that comes soon.
      if (const std::uint64_t ahead = at_ + kAhead * bytes; ahead < size) {
        __builtin_prefetch(contents.data() + ahead);
      }
      add(bytes);
    }
    return at_ == size;
  }

  void leave_out(const Frames& frames) {
    const DataError error = frame_error(frames, file_.path(), at_, file_.size(), number());
    if (!skip_) {
      throw error;
    }
    const bool suspect = frames.fault == FrameFault::magic && frames.parts == 0 && held_ != 0;
    const std::uint64_t next = resynchronise(window_, suspect ? at_ - held_ + kFrameHeaderBytes : at_ + 1);
    std::uint64_t begin = at_;
    if (next < at_) {
      begin -= held_;
      held_ = 0;
    }
    flush();
    index_.add_damage({begin, next - begin, error.what()});
    at_ = next;
  }

  const File& file_;
  Window window_;
  Dialect dialect_;
  bool skip_;
  FileIndex index_;
  std::uint64_t at_ = 0;
  std::uint64_t populated_ = 0;  // up to here, or not worth it
  std::uint64_t held_ = 0;       // bytes of the record that ends at `at_` and is not in the index yet
};

}  // namespace

Frames read_frames(std::span<const std::byte> bytes, bool complete) noexcept {
  return walk(bytes.size(), complete, [&](std::uint64_t at) { return bytes.data() + at; });
}

DataError frame_error(const Frames& frames, const std::string& file, std::uint64_t begin, std::uint64_t size,
                      std::uint64_t record) {
  const std::uint64_t offset = begin + frames.bytes;
  return {is_truncated(frames.fault) ? Problem::truncated : Problem::malformed, file, offset, record,
          explain(frames, size - offset)};
}

std::span<const std::byte> payload_of(std::span<const std::byte> record, const Frames& frames, Dialect dialect,
                                      Buffer& memory) {
  if (frames.parts == 1) {
    return record.subspan(kFrameHeaderBytes, static_cast<std::size_t>(frames.payload));
  }
  const std::size_t joint = dialect == Dialect::dmlc ? sizeof(kRecordMagic) : 0;
  const std::size_t total = static_cast<std::size_t>(frames.payload) + (frames.parts - 1) * joint;
  memory.reserve(total, 0);
  std::byte* out = memory.data();
  for (std::uint32_t part = 0; part < frames.parts; ++part) {
    if (part != 0 && joint != 0) {
      std::memcpy(out, &kRecordMagic, joint);
      out += joint;
    }
    const std::size_t length = words_of(record.data()).length;
    if (length != 0) {
      std::memcpy(out, record.data() + kFrameHeaderBytes, length);
    }
    out += length;
    const std::uint64_t whole = kFrameHeaderBytes + padded(length);
    record = record.subspan(static_cast<std::size_t>(std::min<std::uint64_t>(whole, record.size())));
  }
  return {memory.data(), total};
}

FileIndex scan_recordio(const File& file, Dialect dialect, bool skip) {
  return read_checked(file, [&] { return Scan(file, dialect, skip).run(); });
}

Dialects::Dialects(Dialect wanted, std::size_t files)
    : wanted_(wanted), known_(std::make_shared<std::vector<std::atomic<Dialect>>>(files)) {}

Dialect Dialects::of(const Frames& frames, std::size_t number, const File& file) const {
  if (frames.plain) {
    return Dialect::plain;
  }
  if (wanted_ != Dialect::automatic) {
    return wanted_;
  }
  Dialect known = (*known_)[number].load(std::memory_order_relaxed);
  if (known != Dialect::automatic) {
    return known;
  }
  known = Dialect::dmlc;
  Window window(file);
  for (std::uint64_t at = 0; at < file.size() && known == Dialect::dmlc;) {
    const Frames other = frames_at(window, at);
    if (!other.whole()) {
      at = resynchronise(window, at + 1);  // damage was reported when the file was indexed
      continue;
    }
    known = other.plain ? Dialect::plain : Dialect::dmlc;
    at += other.bytes;
  }
  (*known_)[number].store(known, std::memory_order_relaxed);
  return known;
}

Frames indexed_frames(std::span<const std::byte> record, const Place& place, const File& file) {
  const Frames frames = read_frames(record, true);
  if (!frames.whole() || frames.bytes != record.size()) {
    throw DataError(Problem::changed, file.path(), place.offset + (frames.whole() ? 0 : frames.bytes), place.number,
                    "there is another record here than when the file was indexed; the file was changed while it was "
                    "in use, or its index is of another file: remove the index and start again");
  }
  return frames;
}

}  // namespace launcher::data
