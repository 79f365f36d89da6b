// A JPEG image: each library that is there decodes it to the size that its header says, or refuses it; never past its
// bytes. What a decoder held for one image is no part of the next.
#include "jpeg.h"

#include <charconv>
#include <string_view>

#include "../fuzz.h"

using namespace launcher;
using fuzz::require;

namespace {

// Images of more pixels take long, and are nothing new.
constexpr std::size_t kMostPixels = 1 << 14;

std::string from_hex(std::string_view text) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < text.size(); i += 2) {
    unsigned value = 0;
    std::from_chars(text.data() + i, text.data() + i + 2, value, 16);
    bytes += static_cast<char>(value);
  }
  return bytes;
}

std::string flat_table(char number) { return "\xff\xdb" + std::string("\0\x43", 2) + number + std::string(64, '\xff'); }

const std::vector<std::shared_ptr<const data::JpegLibrary>>& libraries() {
  static const auto found = [] {
    std::vector<std::shared_ptr<const data::JpegLibrary>> all;
    std::string why;
    for (const auto& library :
         {data::open_turbojpeg("libturbojpeg.so.0", why), data::open_libjpeg("libjpeg.so.62", why)}) {
      if (library) {
        all.push_back(library);
      }
    }
    if (all.empty()) {
      std::printf("no JPEG library: %s\n", why.c_str());
    }
    return all;
  }();
  return found;
}

void check(data::JpegDecoder& decoder, std::span<const std::byte> jpeg, unsigned eighths, std::size_t channels) {
  std::size_t width = 0, height = 0;
  data::Image image;
  try {
    decoder.read_size(jpeg, width, height);
    require(width != 0 && height != 0, "an image has pixels");
    if (width > kMostPixels || height > kMostPixels || width * height > kMostPixels) {
      return;
    }
    decoder.decode(jpeg, eighths, channels, image);
  } catch (const data::JpegError& error) {
    require(*error.what() != '\0', "a refusal says why");
    return;
  }
  require(image.width == (width * eighths + 7) / 8 && image.height == (height * eighths + 7) / 8, "its size");
  require(image.pixels.size() == image.width * image.height * channels, "as many pixels");
  std::vector<std::uint8_t> out(7 * 5 * channels);
  std::vector<std::uint16_t> line;
  data::resize(image, {0, 0, static_cast<double>(width * eighths) / 8, static_cast<double>(height * eighths) / 8}, 7, 5,
               channels, out.data(), line);
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  const std::string start = from_hex("ffd8"), table = flat_table(0);
  const std::string grey = from_hex(
      "ffc0000b080002000301011100ffc40014000100000000000000000000000000000003ffc4001410010000000000000000000000000000"
      "0000ffda0008010100003f0037ffd9");
  const std::string cmyk = from_hex(
      "ffc000140800020002044311004d11005911004b1100ffc40014000100000000000000000000000000000003ffc4001410010000000000"
      "0000000000000000000000ffda000e0443004d0059004b00003f0042108fffd9");
  const std::string progressive = from_hex(
      "ffc20011080009000903012200021101031101ffc40014000100000000000000000000000000000001ffc4001401010000000000000000"
      "0000000000000000ffda000c03010002100310000001153fffc40014100100000000000000000000000000000020ffda00080101000105"
      "021fffc40014110100000000000000000000000000000000ffda0008010301013f017fffc4001411010000000000000000000000000000"
      "0000ffda0008010201013f017fffc40014100100000000000000000000000000000020ffda0008010100063f021fffc400161001010100"
      "000000000000000000000000110010ffda0008010100013f21237fffda000c03010002000300000010a3ffd9");
  std::vector<std::string> seeds;
  for (const std::string& image :
       {start + table + grey, start + from_hex("ffee000e41646f626500640000000000") + table + cmyk,
        start + table + flat_table(1) + progressive}) {
    seeds.push_back('\7' + image);
    seeds.push_back('\x0c' + image);
  }
  return seeds;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size == 0) {
    return 0;
  }
  const unsigned eighths = bytes[0] % 8 + 1;
  const std::size_t channels = (bytes[0] & 8) != 0 ? 1 : 3;
  static const std::string grey = fuzz::seeds().front().substr(1);
  for (const auto& library : libraries()) {
    const auto decoder = library->make_decoder();
    check(*decoder, std::as_bytes(std::span(bytes, size)).subspan(1), eighths, channels);
    std::size_t width = 0, height = 0;
    data::Image image;
    decoder->read_size(std::as_bytes(std::span(grey)), width, height);
    decoder->decode(std::as_bytes(std::span(grey)), 8, 1, image);
    require(image.width == 3 && image.height == 2, "the next image is decoded as ever");
  }
  return 0;
}
