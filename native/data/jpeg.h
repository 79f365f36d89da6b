// JPEG images of a field become pixels of one size.
#ifndef LAUNCHER_DATA_JPEG_H
#define LAUNCHER_DATA_JPEG_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "source.h"

namespace launcher::data {

struct JpegError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Pixels, row by row from the top, each of 1 (grey) or 3 (red, green, blue) bytes.
struct Image {
  std::size_t width = 0, height = 0;
  std::vector<std::uint8_t> pixels;
};

// What one thread decodes with.
class JpegDecoder {
 public:
  virtual ~JpegDecoder() = default;
  // Of the image's header. Throws JpegError.
  virtual void read_size(std::span<const std::byte> jpeg, std::size_t& width, std::size_t& height) = 0;
  // At `eighths`/8 of its size, rounded up. Throws JpegError: also for an image that is cut or damaged, which libjpeg
  // itself would fill with grey.
  virtual void decode(std::span<const std::byte> jpeg, unsigned eighths, std::size_t channels, Image& image) = 0;
};

// libjpeg-turbo, found when it is asked for: a library that is not there must not keep what needs none from starting.
class JpegLibrary {
 public:
  virtual ~JpegLibrary() = default;
  virtual std::unique_ptr<JpegDecoder> make_decoder() const = 0;
  const std::string& name() const noexcept { return name_; }

  // The first that works of libturbojpeg.so.0, the libjpeg that this was compiled for, and `paths`, which may be of
  // either kind. Null: none does; `why` says what was tried.
  static std::shared_ptr<const JpegLibrary> find(const std::vector<std::string>& paths, std::string& why);

 protected:
  std::string name_;
};

// Both null when the file is not there or lacks a function.
std::shared_ptr<const JpegLibrary> open_turbojpeg(const std::string& path, std::string& why);
std::shared_ptr<const JpegLibrary> open_libjpeg(const std::string& path, std::string& why);

struct JpegOptions {
  std::string field;           // ragged bytes of the source, each a JPEG file
  std::string name = "image";  // of the field it becomes: uint8, height x width x channels
  std::size_t height = 0, width = 0;
  std::size_t channels = 3;
  bool crop = false;  // the middle part that has the wanted proportions; else the image is stretched
};

// The source's records with the image decoded. It is shrunk as part of decoding to the smallest n/8 that is not smaller
// than what is wanted, then resized between the four nearest pixels. EXIF's orientation is not looked at.
// Throws std::invalid_argument: no such field, or a size of 0.
std::shared_ptr<const Source> jpeg_source(std::shared_ptr<const Source> source, JpegOptions options,
                                          std::shared_ptr<const JpegLibrary> library);

// The part from (x, y) on of `width` x `height`, in pixels of `image`, resized.
struct Part {
  double x, y, width, height;
};
void resize(const Image& image, const Part& part, std::size_t width, std::size_t height, std::size_t channels,
            std::uint8_t* out, std::vector<std::uint16_t>& line);

}  // namespace launcher::data

#endif
