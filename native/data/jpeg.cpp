#include "jpeg.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <utility>

namespace launcher::data {
namespace {

constexpr std::size_t kTogether = 16;  // records that are fetched at once
constexpr std::uint64_t kMostPixels = std::uint64_t{1} << 27;
constexpr unsigned kWhole = 256;  // of a weight

class JpegSource final : public Source {
 public:
  JpegSource(std::shared_ptr<const Source> source, JpegOptions options, std::shared_ptr<const JpegLibrary> library)
      : source_(std::move(source)), options_(std::move(options)), library_(std::move(library)) {
    const auto invalid = [](const std::string& text) { throw std::invalid_argument(text); };
    if (options_.height == 0 || options_.width == 0 || options_.height * options_.width > kMostPixels ||
        options_.height > kMostPixels || options_.width > kMostPixels) {
      invalid("height and width of images are 1 or more, and 2^27 pixels at most");
    }
    if (options_.channels != 1 && options_.channels != 3) {
      invalid("images have 1 channel (grey) or 3 (red, green, blue)");
    }
    fields_ = source_->fields();
    const auto found =
        std::find_if(fields_.begin(), fields_.end(), [&](const Field& field) { return field.name == options_.field; });
    if (found == fields_.end() || found->kind != Kind::ragged || size_of(found->dtype) != 1) {
      invalid("\"" + options_.field + "\" is no field of bytes");
    }
    field_ = static_cast<std::size_t>(found - fields_.begin());
    *found = {options_.name, Kind::fixed, DType::uint8, {options_.height, options_.width, options_.channels}};
    if (std::count_if(fields_.begin(), fields_.end(), [&](const Field& f) { return f.name == options_.name; }) != 1) {
      invalid("there is a field \"" + options_.name + "\" already");
    }
  }

  std::uint64_t records() const noexcept override { return source_->records(); }
  std::uint64_t bytes() const noexcept override { return source_->bytes(); }
  const std::vector<Field>& fields() const noexcept override { return fields_; }
  std::span<const std::shared_ptr<const File>> files() const noexcept override { return source_->files(); }
  void expect(std::span<const std::uint64_t> records) const noexcept override { source_->expect(records); }
  std::unique_ptr<Scratch> make_scratch() const override {
    return std::make_unique<State>(*source_, library_->make_decoder());
  }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override {
    return source_->describe(problem, record, text);
  }

  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch& scratch) const override {
    State& state = static_cast<State&>(scratch);
    for (std::size_t begin = 0; begin < records.size(); begin += kTogether) {
      const auto some = records.subspan(begin, std::min(kTogether, records.size() - begin));
      state.fetched.rows = 0;
      std::exception_ptr error;
      try {
        source_->fetch(some, state.fetched, *state.scratch);
      } catch (const DataError&) {
        error = std::current_exception();  // after the records that came before it
      }
      for (std::size_t i = 0; i < state.fetched.rows; ++i) {
        take(state, i, some[i], batch);
      }
      if (error) {
        std::rethrow_exception(error);
      }
    }
  }

 private:
  struct State final : Scratch {
    State(const Source& source, std::unique_ptr<JpegDecoder> decoder_)
        : scratch(source.make_scratch()), fetched(source.fields(), kTogether), decoder(std::move(decoder_)) {}

    std::unique_ptr<Scratch> scratch;
    Batch fetched;
    std::unique_ptr<JpegDecoder> decoder;
    Image image;
    std::vector<std::uint16_t> line;
  };

  void take(State& state, std::size_t from, std::uint64_t record, Batch& batch) const {
    const std::size_t row = batch.rows;
    for (std::size_t i = 0; i < fields_.size(); ++i) {
      if (i == field_) {
        continue;
      }
      const Column& in = state.fetched.columns[i];
      Column& out = batch.columns[i];
      const std::size_t item = size_of(fields_[i].dtype);
      if (fields_[i].kind == Kind::fixed) {
        const std::size_t bytes = fields_[i].values() * item;
        std::memcpy(out.values.data() + row * bytes, in.values.data() + from * bytes, bytes);
        continue;
      }
      const auto begin = static_cast<std::size_t>(in.offsets[from]);
      const auto count = static_cast<std::size_t>(in.offsets[from + 1]) - begin;
      std::byte* to = append(out, row, count, item);
      if (count != 0) {
        std::memcpy(to, in.values.data() + begin * item, count * item);
      }
      if (fields_[i].kind == Kind::sparse) {
        std::uint64_t* keys = append_keys(out, row, count);
        if (count != 0) {
          std::memcpy(keys, in.keys.data() + begin * sizeof *keys, count * sizeof *keys);
        }
      }
      out.offsets[row + 1] = out.offsets[row] + static_cast<std::int64_t>(count);
    }
    const Column& images = state.fetched.columns[field_];
    const auto begin = static_cast<std::size_t>(images.offsets[from]);
    const auto end = static_cast<std::size_t>(images.offsets[from + 1]);
    const std::size_t bytes = options_.height * options_.width * options_.channels;
    try {
      decode(state, {images.values.data() + begin, end - begin},
             reinterpret_cast<std::uint8_t*>(batch.columns[field_].values.data()) + row * bytes);
    } catch (const JpegError& error) {
      throw source_->describe(Problem::malformed, record, "field \"" + options_.field + "\": " + error.what());
    }
    ++batch.rows;
  }

  void decode(State& state, std::span<const std::byte> jpeg, std::uint8_t* out) const {
    if (jpeg.size() < 2 || jpeg[0] != std::byte{0xff} || jpeg[1] != std::byte{0xd8}) {
      throw JpegError("no JPEG image (it does not begin with ff d8); other images can be decoded by a transform");
    }
    std::size_t width = 0, height = 0;
    state.decoder->read_size(jpeg, width, height);
    if (width == 0 || height == 0 || std::uint64_t{width} * height > kMostPixels) {
      throw JpegError("an image of " + std::to_string(width) + " x " + std::to_string(height) +
                      " pixels; the largest that is decoded has 2^27");
    }
    const double wanted_width = static_cast<double>(options_.width);
    const double wanted_height = static_cast<double>(options_.height);
    // The part that is wanted, as shares of the image.
    double share_x = 1, share_y = 1;
    if (options_.crop) {
      const double scale =
          std::min(static_cast<double>(width) / wanted_width, static_cast<double>(height) / wanted_height);
      share_x = scale * wanted_width / static_cast<double>(width);
      share_y = scale * wanted_height / static_cast<double>(height);
    }
    unsigned eighths = 1;
    while (eighths < 8 && (static_cast<double>(width * eighths) / 8 * share_x < wanted_width ||
                           static_cast<double>(height * eighths) / 8 * share_y < wanted_height)) {
      ++eighths;
    }
    Image& image = state.image;
    state.decoder->decode(jpeg, eighths, options_.channels, image);
    if (!options_.crop && image.width == options_.width && image.height == options_.height) {
      std::memcpy(out, image.pixels.data(), image.width * image.height * options_.channels);
      return;
    }
    // Not of the decoded image's size, which is rounded up.
    const double scaled_width = static_cast<double>(width * eighths) / 8;
    const double scaled_height = static_cast<double>(height * eighths) / 8;
    const Part part{scaled_width * (1 - share_x) / 2, scaled_height * (1 - share_y) / 2, scaled_width * share_x,
                    scaled_height * share_y};
    resize(image, part, options_.width, options_.height, options_.channels, out, state.line);
  }

  std::shared_ptr<const Source> source_;
  JpegOptions options_;
  std::shared_ptr<const JpegLibrary> library_;
  std::vector<Field> fields_;
  std::size_t field_ = 0;
};

// The two pixels that a pixel of the result lies between, by their middles, and how much of the second it is.
struct Between {
  std::size_t first, second;
  unsigned weight;
};

Between between(std::size_t i, std::size_t count, double begin, double length, std::size_t available) {
  const double at = begin + (static_cast<double>(i) + 0.5) * length / static_cast<double>(count) - 0.5;
  const double last = static_cast<double>(available - 1);
  const double inside = std::clamp(at, 0.0, last);
  const auto first = static_cast<std::size_t>(inside);
  const auto weight = static_cast<unsigned>(std::lround((inside - static_cast<double>(first)) * kWhole));
  return {first, std::min(first + 1, available - 1), weight};
}

}  // namespace

void resize(const Image& image, const Part& part, std::size_t width, std::size_t height, std::size_t channels,
            std::uint8_t* out, std::vector<std::uint16_t>& line) {
  std::vector<Between> columns(width);
  for (std::size_t x = 0; x < width; ++x) {
    columns[x] = between(x, width, part.x, part.width, image.width);
    columns[x].first *= channels;
    columns[x].second *= channels;
  }
  const std::size_t values = image.width * channels;
  line.resize(values);
  for (std::size_t y = 0; y < height; ++y) {
    const Between rows = between(y, height, part.y, part.height, image.height);
    const std::uint8_t* above = image.pixels.data() + rows.first * values;
    const std::uint8_t* below = image.pixels.data() + rows.second * values;
    const unsigned weight = rows.weight;
    for (std::size_t i = 0; i < values; ++i) {
      line[i] = static_cast<std::uint16_t>(above[i] * (kWhole - weight) + below[i] * weight);
    }
    for (const Between& column : columns) {
      for (std::size_t channel = 0; channel < channels; ++channel) {
        const unsigned sum =
            line[column.first + channel] * (kWhole - column.weight) + line[column.second + channel] * column.weight;
        *out++ = static_cast<std::uint8_t>((sum + kWhole * kWhole / 2) / (kWhole * kWhole));
      }
    }
  }
}

std::shared_ptr<const Source> jpeg_source(std::shared_ptr<const Source> source, JpegOptions options,
                                          std::shared_ptr<const JpegLibrary> library) {
  return std::make_shared<JpegSource>(std::move(source), std::move(options), std::move(library));
}

}  // namespace launcher::data
