// libjpeg-turbo by its two interfaces: TurboJPEG, of which a few functions and numbers are all there is to know, and
// libjpeg's, whose structures must be those of the library; the header says which, if there was one to compile with.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#include "jpeg.h"

#if __has_include(<jpeglib.h>)
#define LAUNCHER_HAS_JPEGLIB
#include <jpeglib.h>
// after it: its types are needed
#include <jerror.h>

#include <csetjmp>
#endif

namespace launcher::data {
namespace {

class Shared {
 public:
  explicit Shared(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {}
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  ~Shared() {
    if (handle_ != nullptr) {
      dlclose(handle_);
    }
  }

  // Null: there is no such function.
  template <typename Function>
  bool get(const char* name, Function*& function) {
    function = handle_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(handle_, name));
    return function != nullptr;
  }
  explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  void* handle_;
};

std::size_t scaled(std::size_t size, unsigned eighths) { return (size * eighths + 7) / 8; }

// Adobe's CMYK is stored inverted: 255 is no ink.
void from_cmyk(const std::uint8_t* cmyk, std::size_t count, std::size_t channels, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; ++i, cmyk += 4) {
    unsigned rgb[3];
    for (std::size_t c = 0; c < 3; ++c) {
      rgb[c] = (cmyk[c] * cmyk[3] + 127U) / 255U;
    }
    if (channels == 3) {
      for (const unsigned value : rgb) {
        *out++ = static_cast<std::uint8_t>(value);
      }
    } else {
      // ITU-R BT.601, as JFIF has it.
      *out++ = static_cast<std::uint8_t>((299U * rgb[0] + 587U * rgb[1] + 114U * rgb[2] + 500U) / 1000U);
    }
  }
}

// --- TurboJPEG: turbojpeg.h of libjpeg-turbo 1.4 and later ---------------------------------------------------------

constexpr int kRgb = 0, kGrey = 6, kCmyk = 11;         // TJPF_*
constexpr int kFromCmyk = 3, kFromYcck = 4;            // TJCS_*
constexpr int kStopOnWarning = 8192;                   // TJFLAG_STOPONWARNING, since 2.0
constexpr const char* kHarmless = "extraneous bytes";  // before a marker: cameras write such, no pixel is lost

struct TurboFunctions {
  void* (*start)() = nullptr;
  int (*stop)(void*) = nullptr;
  int (*header)(void*, const unsigned char*, unsigned long, int*, int*, int*, int*) = nullptr;
  int (*decompress)(void*, const unsigned char*, unsigned long, unsigned char*, int, int, int, int, int) = nullptr;
  char* (*error)(void*) = nullptr;
};

class TurboDecoder final : public JpegDecoder {
 public:
  explicit TurboDecoder(const TurboFunctions& functions) : functions_(functions), handle_(functions.start()) {
    if (handle_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  TurboDecoder(const TurboDecoder&) = delete;
  TurboDecoder& operator=(const TurboDecoder&) = delete;
  ~TurboDecoder() override { functions_.stop(handle_); }

  void read_size(std::span<const std::byte> jpeg, std::size_t& width, std::size_t& height) override {
    int columns = 0, rows = 0, subsampling = 0;
    if (functions_.header(handle_, bytes(jpeg), jpeg.size(), &columns, &rows, &subsampling, &colours_) != 0 ||
        columns <= 0 || rows <= 0) {
      throw JpegError(functions_.error(handle_));
    }
    width = width_ = static_cast<std::size_t>(columns);
    height = height_ = static_cast<std::size_t>(rows);
  }

  void decode(std::span<const std::byte> jpeg, unsigned eighths, std::size_t channels, Image& image) override {
    image.width = scaled(width_, eighths);
    image.height = scaled(height_, eighths);
    image.pixels.resize(image.width * image.height * channels);
    if (colours_ != kFromCmyk && colours_ != kFromYcck) {
      decompress(jpeg, image, channels == 1 ? kGrey : kRgb, image.pixels.data());
      return;
    }
    cmyk_.resize(image.width * image.height * 4);
    decompress(jpeg, image, kCmyk, cmyk_.data());
    from_cmyk(cmyk_.data(), image.width * image.height, channels, image.pixels.data());
  }

 private:
  static const unsigned char* bytes(std::span<const std::byte> jpeg) {
    return reinterpret_cast<const unsigned char*>(jpeg.data());
  }

  void decompress(std::span<const std::byte> jpeg, const Image& image, int format, std::uint8_t* out) {
    for (const int flags : {kStopOnWarning, 0}) {
      if (functions_.decompress(handle_, bytes(jpeg), jpeg.size(), out, static_cast<int>(image.width), 0,
                                static_cast<int>(image.height), format, flags) == 0) {
        return;
      }
      const char* text = functions_.error(handle_);
      if (std::strstr(text, kHarmless) == nullptr) {
        throw JpegError(text);
      }
    }
  }

  const TurboFunctions& functions_;
  void* handle_;
  std::size_t width_ = 0, height_ = 0;
  int colours_ = 0;
  std::vector<std::uint8_t> cmyk_;
};

class TurboLibrary final : public JpegLibrary {
 public:
  explicit TurboLibrary(const std::string& path) : shared_(path) { name_ = path + " (TurboJPEG)"; }

  bool complete() {
    return shared_.get("tjInitDecompress", functions_.start) && shared_.get("tjDestroy", functions_.stop) &&
           shared_.get("tjDecompressHeader3", functions_.header) &&
           shared_.get("tjDecompress2", functions_.decompress) && shared_.get("tjGetErrorStr2", functions_.error);
  }
  bool there() const { return static_cast<bool>(shared_); }
  std::unique_ptr<JpegDecoder> make_decoder() const override { return std::make_unique<TurboDecoder>(functions_); }

 private:
  Shared shared_;
  TurboFunctions functions_;
};

// --- libjpeg -------------------------------------------------------------------------------------------------------
#ifdef LAUNCHER_HAS_JPEGLIB

struct LibjpegFunctions {
  decltype(&jpeg_std_error) standard_error = nullptr;
  decltype(&jpeg_CreateDecompress) create = nullptr;
  decltype(&jpeg_destroy_decompress) destroy = nullptr;
  decltype(&jpeg_mem_src) source = nullptr;
  decltype(&jpeg_read_header) header = nullptr;
  decltype(&jpeg_start_decompress) start = nullptr;
  decltype(&jpeg_read_scanlines) read = nullptr;
  decltype(&jpeg_finish_decompress) finish = nullptr;
  decltype(&jpeg_abort_decompress) abort = nullptr;
};

// Errors of libjpeg leave by a jump: no object with a destructor may live in the frames between.
class LibjpegDecoder final : public JpegDecoder {
 public:
  explicit LibjpegDecoder(const LibjpegFunctions& functions) : functions_(functions) {
    info_.err = functions_.standard_error(&errors_);
    info_.client_data = this;
    errors_.error_exit = [](j_common_ptr info) {
      auto* self = static_cast<LibjpegDecoder*>(info->client_data);
      info->err->format_message(info, self->text_);
      std::longjmp(self->jump_, 1);
    };
    errors_.emit_message = [](j_common_ptr info, int level) {
      if (level < 0 && info->err->msg_code != JWRN_EXTRANEOUS_DATA) {
        info->err->error_exit(info);
      }
    };
    errors_.output_message = [](j_common_ptr) {};
    if (setjmp(jump_) == 0) {
      functions_.create(&info_, JPEG_LIB_VERSION, sizeof info_);
      created_ = true;
    }
    if (!created_) {
      throw JpegError(text_);
    }
  }
  LibjpegDecoder(const LibjpegDecoder&) = delete;
  LibjpegDecoder& operator=(const LibjpegDecoder&) = delete;
  ~LibjpegDecoder() override { functions_.destroy(&info_); }

  void read_size(std::span<const std::byte> jpeg, std::size_t& width, std::size_t& height) override {
    if (!read_header(reinterpret_cast<const unsigned char*>(jpeg.data()), jpeg.size())) {
      throw JpegError(text_);
    }
    width = info_.image_width;
    height = info_.image_height;
  }

  void decode(std::span<const std::byte> jpeg, unsigned eighths, std::size_t channels, Image& image) override {
    if (!read_header(reinterpret_cast<const unsigned char*>(jpeg.data()), jpeg.size())) {
      throw JpegError(text_);
    }
    image.width = scaled(info_.image_width, eighths);
    image.height = scaled(info_.image_height, eighths);
    image.pixels.resize(image.width * image.height * channels);
    const bool cmyk = info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK;
    const std::size_t row_bytes = image.width * (cmyk ? 4 : channels);
    if (cmyk) {
      cmyk_.resize(row_bytes * image.height);
    }
    info_.out_color_space = cmyk ? JCS_CMYK : channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
    info_.scale_num = eighths;
    info_.scale_denom = 8;
    if (!read_rows(cmyk ? cmyk_.data() : image.pixels.data(), row_bytes, image.width, image.height)) {
      throw JpegError(text_);
    }
    if (cmyk) {
      from_cmyk(cmyk_.data(), image.width * image.height, channels, image.pixels.data());
    }
  }

 private:
  bool read_header(const unsigned char* bytes, unsigned long count) {
    if (setjmp(jump_) != 0) {
      functions_.abort(&info_);
      return false;
    }
    functions_.abort(&info_);
    functions_.source(&info_, const_cast<unsigned char*>(bytes), count);
    functions_.header(&info_, TRUE);
    return true;
  }

  bool read_rows(std::uint8_t* out, std::size_t row_bytes, std::size_t width, std::size_t height) {
    if (setjmp(jump_) != 0) {
      functions_.abort(&info_);
      return false;
    }
    functions_.start(&info_);
    if (info_.output_width != width || info_.output_height != height ||
        info_.output_width * static_cast<std::size_t>(info_.output_components) != row_bytes) {
      std::snprintf(text_, sizeof text_, "libjpeg would make an image of %u x %u", info_.output_width,
                    info_.output_height);
      functions_.abort(&info_);
      return false;
    }
    while (info_.output_scanline < info_.output_height) {
      JSAMPROW row = out + info_.output_scanline * row_bytes;
      functions_.read(&info_, &row, 1);
    }
    functions_.finish(&info_);
    return true;
  }

  const LibjpegFunctions& functions_;
  jpeg_decompress_struct info_{};
  jpeg_error_mgr errors_{};
  std::jmp_buf jump_{};
  bool created_ = false;
  char text_[JMSG_LENGTH_MAX] = "";
  std::vector<std::uint8_t> cmyk_;
};

class LibjpegLibrary final : public JpegLibrary {
 public:
  explicit LibjpegLibrary(const std::string& path) : shared_(path) { name_ = path + " (libjpeg)"; }

  bool complete() {
    return shared_.get("jpeg_std_error", functions_.standard_error) &&
           shared_.get("jpeg_CreateDecompress", functions_.create) &&
           shared_.get("jpeg_destroy_decompress", functions_.destroy) &&
           shared_.get("jpeg_mem_src", functions_.source) && shared_.get("jpeg_read_header", functions_.header) &&
           shared_.get("jpeg_start_decompress", functions_.start) &&
           shared_.get("jpeg_read_scanlines", functions_.read) &&
           shared_.get("jpeg_finish_decompress", functions_.finish) &&
           shared_.get("jpeg_abort_decompress", functions_.abort);
  }
  bool there() const { return static_cast<bool>(shared_); }
  std::unique_ptr<JpegDecoder> make_decoder() const override { return std::make_unique<LibjpegDecoder>(functions_); }

 private:
  Shared shared_;
  LibjpegFunctions functions_;
};

#endif

// A library that is there, has the functions, and agrees with what we were compiled for.
template <typename Library>
std::shared_ptr<const JpegLibrary> open(const std::string& path, std::string& why) {
  auto library = std::make_shared<Library>(path);
  if (!library->complete()) {
    why += (why.empty() ? "" : "; ") + path + (library->there() ? " lacks functions" : " is not there");
    return nullptr;
  }
  try {
    library->make_decoder();
  } catch (const JpegError& error) {
    why += (why.empty() ? "" : "; ") + path + ": " + error.what();
    return nullptr;
  }
  return library;
}

}  // namespace

std::shared_ptr<const JpegLibrary> open_turbojpeg(const std::string& path, std::string& why) {
  return open<TurboLibrary>(path, why);
}

std::shared_ptr<const JpegLibrary> open_libjpeg(const std::string& path, std::string& why) {
#ifdef LAUNCHER_HAS_JPEGLIB
  return open<LibjpegLibrary>(path, why);
#else
  why += (why.empty() ? "" : "; ") + path + " was not tried: this launcher was built without jpeglib.h";
  return nullptr;
#endif
}

std::shared_ptr<const JpegLibrary> JpegLibrary::find(const std::vector<std::string>& paths, std::string& why) {
  std::shared_ptr<const JpegLibrary> library = open_turbojpeg("libturbojpeg.so.0", why);
#ifdef LAUNCHER_HAS_JPEGLIB
  if (!library) {
    library = open_libjpeg(JPEG_LIB_VERSION >= 80 ? "libjpeg.so.8" : "libjpeg.so.62", why);
  }
#endif
  for (const std::string& path : paths) {
    if (!library) {
      library = path.find("turbojpeg") == std::string::npos ? open_libjpeg(path, why) : open_turbojpeg(path, why);
    }
  }
  return library;
}

}  // namespace launcher::data
