// zlib by dlopen: a channel that is compressed is rare, and every image has the library.
#include <dlfcn.h>

#include <algorithm>
#include <limits>

#include "batch.h"
#include "pipe.h"

namespace launcher::data {
namespace {

// The stable part of zlib's interface (zlib.h, version 1): sizes and order of the members are checked by
// inflateInit2_() itself, which is told them.
struct ZStream {
  const unsigned char* next_in = nullptr;
  unsigned avail_in = 0;
  unsigned long total_in = 0;
  unsigned char* next_out = nullptr;
  unsigned avail_out = 0;
  unsigned long total_out = 0;
  const char* msg = nullptr;
  void* state = nullptr;
  void* (*zalloc)(void*, unsigned, unsigned) = nullptr;
  void (*zfree)(void*, void*) = nullptr;
  void* opaque = nullptr;
  int data_type = 0;
  unsigned long adler = 0;
  unsigned long reserved = 0;
};
constexpr int kOk = 0, kStreamEnd = 1, kBufferError = -5;
constexpr int kNoFlush = 0;
constexpr int kGzipOnly = 15 + 16;  // the largest window, a gzip header
constexpr std::size_t kInputBytes = std::size_t{1} << 20;

struct Zlib {
  int (*init)(ZStream*, int, const char*, int) = nullptr;
  int (*step)(ZStream*, int) = nullptr;
  int (*reset)(ZStream*) = nullptr;
  int (*end)(ZStream*) = nullptr;

  Zlib() noexcept {
    void* library = ::dlopen("libz.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) {
      init = reinterpret_cast<decltype(init)>(::dlsym(library, "inflateInit2_"));
      step = reinterpret_cast<decltype(step)>(::dlsym(library, "inflate"));
      reset = reinterpret_cast<decltype(reset)>(::dlsym(library, "inflateReset"));
      end = reinterpret_cast<decltype(end)>(::dlsym(library, "inflateEnd"));
    }
  }
  bool there() const noexcept { return init != nullptr && step != nullptr && reset != nullptr && end != nullptr; }
};

const Zlib& zlib() noexcept {
  static const Zlib found;
  return found;
}

class Inflated final : public ByteStream {
 public:
  Inflated(std::unique_ptr<ByteStream> inner, std::string path)
      : inner_(std::move(inner)), path_(std::move(path)), input_(kInputBytes) {
    if (!zlib().there()) {
      fail(Problem::unreadable, "the channel is compressed by gzip and zlib (libz.so.1) is not there; install zlib");
    }
    if (zlib().init(&z_, kGzipOnly, "1", static_cast<int>(sizeof z_)) != kOk) {
      fail(Problem::unreadable, "zlib can not be used: it has another interface, or no memory is left");
    }
  }
  ~Inflated() override { zlib().end(&z_); }

  std::optional<std::size_t> read(std::byte* to, std::size_t bytes, int stop) override {
    z_.next_out = reinterpret_cast<unsigned char*>(to);
    z_.avail_out = static_cast<unsigned>(std::min<std::size_t>(bytes, std::numeric_limits<unsigned>::max()));
    const unsigned room = z_.avail_out;
    while (z_.avail_out == room) {
      if (z_.avail_in == 0) {
        const std::optional<std::size_t> count = inner_->read(input_.data(), kInputBytes, stop);
        if (!count) {
          return std::nullopt;
        }
        if (*count == 0) {
          if (inside_) {
            fail(Problem::truncated, "the compressed stream ends inside a gzip member");
          }
          return 0;
        }
        z_.next_in = reinterpret_cast<const unsigned char*>(input_.data());
        z_.avail_in = static_cast<unsigned>(*count);
        taken_ += *count;
      }
      inside_ = true;
      const int result = zlib().step(&z_, kNoFlush);
      if (result == kStreamEnd) {  // another member may follow
        inside_ = false;
        zlib().reset(&z_);
      } else if (result != kOk && result != kBufferError) {
        fail(Problem::malformed, std::string("found bytes that gzip did not make (") +
                                     (z_.msg == nullptr ? "no reason given" : z_.msg) +
                                     "); see whether the channel's CompressionType is Gzip");
      }
    }
    return room - z_.avail_out;
  }

 private:
  [[noreturn]] void fail(Problem problem, const std::string& text) const {
    throw DataError(problem, path_, taken_ - z_.avail_in, kNowhere, text);
  }

  std::unique_ptr<ByteStream> inner_;
  std::string path_;
  Buffer input_;
  ZStream z_;
  bool inside_ = false;      // a member
  std::uint64_t taken_ = 0;  // compressed bytes so far
};

}  // namespace

std::unique_ptr<ByteStream> inflate(std::unique_ptr<ByteStream> inner, std::string path) {
  return std::make_unique<Inflated>(std::move(inner), std::move(path));
}

}  // namespace launcher::data
