#include "framing.h"

#include <cstring>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "recordio.h"

namespace launcher::data {
namespace {

constexpr std::uint64_t kTooLong = std::uint64_t{1} << 40;  // of a TFRecord: no memory holds it

[[noreturn]] void fail_inside(const Spot& spot, std::uint64_t wanted, std::size_t found) {
  throw DataError(Problem::truncated, spot.file, spot.offset, spot.record,
                  "the stream ends inside a record: it wants " + std::to_string(wanted) + " bytes, " +
                      std::to_string(found) + " are there");
}

class RecordIo final : public Framer {
 public:
  explicit RecordIo(std::size_t group) : group_(group) {}

  Framed next(std::span<const std::byte> bytes, bool last, const Spot& spot) override {
    for (;;) {
      const std::span<const std::byte> rest = bytes.subspan(at_);
      std::uint64_t length = 0;
      if (const std::optional<std::uint32_t> payload = single_frame(rest)) {
        const std::uint64_t padded = (std::uint64_t{*payload} + 3) / 4 * 4;
        length = kFrameHeaderBytes + padded;
        if (length > rest.size()) {  // the last pad of all may be missing
          length = last ? rest.size() : 0;
        }
      } else if (!rest.empty()) {
        const Frames frames = read_frames(rest, last);
        if (frames.fault != FrameFault::none) {
          throw frame_error(frames, spot.file, spot.offset + at_, spot.offset + bytes.size(), spot.record);
        }
        length = frames.more ? 0 : frames.bytes;
      } else if (last && complete_ != 0) {
        throw DataError(Problem::truncated, spot.file, spot.offset, spot.record,
                        "the stream ends inside a sample, after " + std::to_string(complete_) + " of its " +
                            std::to_string(group_) +
                            " records; name as many attributes as the channel's AttributeNames has");
      }
      if (length == 0) {
        return {};
      }
      at_ += static_cast<std::size_t>(length);
      if (++complete_ == group_) {
        complete_ = 0;
        return {0, std::exchange(at_, 0)};
      }
    }
  }

 private:
  std::size_t group_;
  // Of the sample that is being looked at:
  std::size_t at_ = 0;        // behind its last whole record
  std::size_t complete_ = 0;  // its whole records
};

class TfRecord final : public Framer {
 public:
  Framed next(std::span<const std::byte> bytes, bool last, const Spot& spot) override {
    constexpr std::size_t header = 12, footer = 4;  // length and its check; check of the data
    if (bytes.empty() || (bytes.size() < header && !last)) {
      return {};
    }
    if (bytes.size() < header) {
      throw DataError(Problem::truncated, spot.file, spot.offset, spot.record,
                      "truncated header: " + std::to_string(bytes.size()) +
                          " bytes after the last record, expected none or a TFRecord's header of 12");
    }
    std::uint64_t length;
    std::memcpy(&length, bytes.data(), sizeof length);
    if (length > kTooLong) {
      throw DataError(Problem::malformed, spot.file, spot.offset, spot.record,
                      "a TFRecord of " + std::to_string(length) +
                          " bytes; see whether the channel is uncompressed TFRecord at all");
    }
    if (bytes.size() - header < length + footer) {
      if (last) {
        fail_inside(spot, header + length + footer, bytes.size());
      }
      return {};
    }
    return {0, header + static_cast<std::size_t>(length) + footer};
  }
};

class Fixed final : public Framer {
 public:
  explicit Fixed(std::size_t stride) : stride_(stride) {}

  Framed next(std::span<const std::byte> bytes, bool last, const Spot& spot) override {
    if (bytes.size() >= stride_) {
      return {0, stride_};
    }
    if (last && !bytes.empty()) {
      fail_inside(spot, stride_, bytes.size());
    }
    return {};
  }

 private:
  std::size_t stride_;
};

class Lines final : public Framer {
 public:
  Lines(const LineRules& rules, bool header) : lines_(rules), header_(header) {}

  Framed next(std::span<const std::byte> bytes, bool last, const Spot& spot) override {
    constexpr std::string_view mark = "\xEF\xBB\xBF";  // what some programs put before UTF-8
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    if (!begun_) {
      if (text.size() < mark.size() && !last) {
        return {};
      }
      begun_ = true;
      skipped_ = text.starts_with(mark) ? mark.size() : 0;
    }
    if (at_ == found_.size()) {
      at_ = 0;
      found_.clear();
      const auto note = [this](std::uint64_t begin, std::uint64_t end) { found_.emplace_back(begin, end); };
      lines_.feed(text.substr(static_cast<std::size_t>(lines_.offset() + skipped_ - begin_)), note);
      if (last && !finished_) {
        finished_ = true;
        if (!lines_.finish(note)) {
          throw DataError(Problem::truncated, spot.file, lines_.line_begin() + skipped_, spot.record,
                          "a quoted field of the record that begins here has no closing quote; read it without "
                          "quoting if quotes are plain text in it");
        }
      }
    }
    while (at_ < found_.size()) {
      const auto [begin, end] = found_[at_++];
      const Framed out{static_cast<std::size_t>(begin + skipped_ - begin_),
                       static_cast<std::size_t>(end + skipped_ - begin_)};
      if (header_ && is_header(without_line_end(text.substr(out.begin, out.end - out.begin)))) {
        continue;
      }
      begin_ += out.end;
      return out;
    }
    return {};
  }

  std::string heading() const override { return names_ ? *names_ + '\n' : std::string(); }

 private:
  bool is_header(std::string_view line) {
    if (!names_) {
      names_ = line;
    }
    return line == *names_;
  }

  LineFramer lines_;
  bool header_;
  std::optional<std::string> names_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> found_;
  std::size_t at_ = 0;         // of `found_`, the next to give
  std::uint64_t skipped_ = 0;  // a byte order mark
  std::uint64_t begin_ = 0;    // where `bytes` begin in the stream
  bool begun_ = false, finished_ = false;
};

}  // namespace

std::unique_ptr<Framer> recordio_framer(std::size_t group) { return std::make_unique<RecordIo>(group); }
std::unique_ptr<Framer> tfrecord_framer() { return std::make_unique<TfRecord>(); }
std::unique_ptr<Framer> fixed_framer(std::size_t stride) { return std::make_unique<Fixed>(stride); }
std::unique_ptr<Framer> line_framer(const LineRules& rules, bool header) {
  return std::make_unique<Lines>(rules, header);
}

}  // namespace launcher::data
