#include <algorithm>
#include <string>
#include <utility>

#include "tar.h"

namespace launcher::data {
namespace {

constexpr std::uint64_t kBlock = 512;
constexpr int kChain = 3;  // headers that must hold after damage, before what follows is believed

class Scanner {
 public:
  Scanner(TarBytes& bytes, bool skip) : bytes_(bytes), skip_(skip) {}

  FileIndex scan() {
    refuse_compressed();
    std::uint64_t at = 0;
    while (at < bytes_.end()) {
      TarReader reader(bytes_, at, true);
      try {
        read(reader);
        at = bytes_.end();
      } catch (const DataError& error) {
        if (!skip_ || error.problem() == Problem::changed || error.problem() == Problem::unreadable) {
          throw;
        }
        at = pass_over(reader.offset(), error.what());
      }
    }
    return std::move(index_);
  }

 private:
  void refuse_compressed() {
    if (bytes_.end() < 2) {
      return;
    }
    const auto first = bytes_.view(0, 2);
    const bool gzip = first[0] == std::byte{0x1f} && first[1] == std::byte{0x8b};
    const bool zstd = first[0] == std::byte{0x28} && first[1] == std::byte{0xb5};
    if (gzip || zstd) {
      throw DataError(Problem::malformed, bytes_.path(), 0, kNowhere,
                      std::string(gzip ? "gzip" : "zstd") +
                          ", not tar: archives are read in place and must not be compressed; decompress it");
    }
  }

  void read(TarReader& reader) {
    TarMember member;
    while (true) {
      reader.record = index_.records();
      if (!reader.next(member)) {
        break;
      }
      if (!member.regular || member.key.empty()) {
        continue;
      }
      if (!open_ || member.key != key_) {
        finish();
        open_ = true;
        key_.assign(member.key);
        begin_ = member.begin;
        extensions_.clear();
      }
      end_ = member.end;
      if (skip_) {
        extensions_.emplace_back(member.extension);
      }
    }
    finish();
  }

  bool complete() {
    std::sort(extensions_.begin(), extensions_.end());
    return !skip_ || usual_.empty() || extensions_ == usual_;
  }

  void finish() {
    if (!open_) {
      return;
    }
    open_ = false;
    // The first sample after damage may have lost members to it: it counts if it is as the others are.
    const bool whole = !after_damage_ || (key_ != damaged_key_ && complete());
    after_damage_ = false;
    if (!whole) {
      index_.add_damage({begin_, end_ - begin_, "the rest of a damaged sample"});
      return;
    }
    index_.add(begin_, end_ - begin_);
    if (skip_ && usual_.empty()) {
      complete();
      usual_ = extensions_;
    }
  }

  // Where to go on after damage at `offset`: the next place from which headers follow each other.
  std::uint64_t pass_over(std::uint64_t offset, const std::string& text) {
    std::uint64_t begin = offset;
    damaged_key_.clear();
    if (open_) {
      damaged_key_ = key_;
      if (usual_.empty() || !complete() || after_damage_) {
        begin = begin_;  // members of this sample are lost
        open_ = false;
      } else {
        finish();
      }
    }
    std::uint64_t at = offset + kBlock;
    while (at < bytes_.end() && !holds(at)) {
      at += kBlock;
    }
    at = std::min(at, bytes_.end());
    index_.add_damage({begin, at - begin, text});
    after_damage_ = true;
    return at;
  }

  bool holds(std::uint64_t at) {
    if (bytes_.end() - at >= kBlock && bytes_.view(at, 1)[0] == std::byte{0}) {
      return false;  // no name begins so; and the zeros at the end need not be read again and again
    }
    TarReader reader(bytes_, at, false);
    TarMember member;
    try {
      for (int i = 0; i < kChain; ++i) {
        if (!reader.next(member)) {
          return i != 0;
        }
      }
    } catch (const DataError& error) {
      if (error.problem() == Problem::changed || error.problem() == Problem::unreadable) {
        throw;
      }
      return false;
    }
    return true;
  }

  TarBytes& bytes_;
  bool skip_;
  FileIndex index_;
  // The sample whose members come now.
  bool open_ = false;
  std::string key_;
  std::uint64_t begin_ = 0, end_ = 0;
  std::vector<std::string> extensions_;  // kept where damage is passed over
  std::vector<std::string> usual_;       // of the first whole sample, sorted
  bool after_damage_ = false;
  std::string damaged_key_;
};

}  // namespace

FileIndex scan_tar(TarBytes bytes, bool skip) { return Scanner(bytes, skip).scan(); }

FileIndex scan_tar(const File& file, bool skip) {
  return read_checked(file, [&] { return scan_tar(TarBytes(file), skip); });
}

}  // namespace launcher::data
