#include <nanobind/stl/function.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../waiting.h"
#include "arguments.h"
#include "batches.h"
#include "dealer.h"
#include "module.h"
#include "receiver.h"
#include "source.h"
#include "stream_codecs.h"
#include "stream_cursor.h"

namespace launcher::python {
namespace {

using SharedDecoder = std::shared_ptr<data::StreamDecoder>;

Descriptor duplicate(int fd) {
  Descriptor out(::dup(fd));
  if (!out) {
    throw nb::value_error("a file descriptor that is not open");
  }
  return out;
}

using TextRules = std::tuple<std::string, std::string, std::string, bool, bool>;  // quote to keep_blank, header

// `unit`: records of a sample, or bytes of a record.
std::function<std::unique_ptr<data::Framer>()> framer_of(const std::string& framing, std::size_t unit,
                                                         const TextRules& text) {
  if (unit == 0) {
    throw nb::value_error("unit is 0; expected 1 at least");
  }
  if (framing == "recordio") {
    return [unit] { return data::recordio_framer(unit); };
  }
  if (framing == "fixed") {
    return [unit] { return data::fixed_framer(unit); };
  }
  if (framing == "tfrecord") {
    return [] { return data::tfrecord_framer(); };
  }
  if (framing != "lines") {
    throw nb::value_error("framing is recordio, tfrecord, fixed or lines");
  }
  const auto& [quote, delimiter, comment, keep_blank, header] = text;
  if (quote.size() > 1 || delimiter.size() > 1 || comment.size() > 1) {
    throw nb::value_error("quote, delimiter and comment are one character each, or none");
  }
  const data::LineRules rules{quote[0], delimiter[0], comment[0], keep_blank};  // of an empty text: '\0'
  return [rules, names = header] { return data::line_framer(rules, names); };
}

// Called by the dealer's thread. What Python raises becomes the text of an error that all ranks get.
std::function<bool(std::uint64_t, bool)> agreement(nb::object function) {
  if (function.is_none()) {
    return {};
  }
  return [held = hold(std::move(function))](std::uint64_t step, bool ready) {
    nb::gil_scoped_acquire locked;
    try {
      return nb::cast<bool>((*held)(step, ready));
    } catch (const nb::python_error& error) {
      throw std::runtime_error(nb::cast<std::string>(nb::str(error.value())));
    }
  };
}

class Dealer {
 public:
  Dealer(const std::vector<int>& rings, const std::vector<int>& sockets, const std::string& framing, std::size_t unit,
         const TextRules& text, std::uint64_t batch, std::uint64_t world, std::uint64_t first, int tail,
         std::size_t window, std::size_t window_bytes, std::uint64_t seed, nb::object agree) {
    if (rings.size() != sockets.size() || tail < 0 || tail > 2) {
      throw nb::value_error("a dealer has a socket for each ring, and tail is 0, 1 or 2");
    }
    data::DealerOptions options;
    options.batch = batch;
    options.world = world;
    options.first = first;
    options.tail = static_cast<data::Tail>(tail);
    options.window = window;
    options.window_bytes = window_bytes;
    options.seed = seed;
    options.make_framer = framer_of(framing, unit, text);
    options.agree = agreement(std::move(agree));
    std::vector<data::Dealer::Outlet> outlets;
    for (std::size_t i = 0; i < rings.size(); ++i) {
      outlets.push_back({duplicate(rings[i]), duplicate(sockets[i])});
    }
    dealer_.emplace(std::move(options), std::move(outlets));
  }
  Dealer(const Dealer&) = delete;
  Dealer& operator=(const Dealer&) = delete;
  ~Dealer() { close(); }

  void start(const std::string& path, const std::string& channel, std::uint64_t epoch, double timeout_s,
             std::uint64_t skip, bool gzip) {
    data::PipeOptions options{path, channel, epoch, timeout_of(timeout_s)};
    const WithoutGil free;
    std::unique_ptr<data::ByteStream> stream = std::make_unique<data::Pipe>(std::move(options));
    if (gzip) {
      stream = data::inflate(std::move(stream), path);
    }
    dealer_->start(std::move(stream), path, epoch, skip);
  }

  void refuse(const std::string& file, const std::string& text) {
    const WithoutGil free;
    dealer_->refuse({data::Problem::unreadable, file, data::kNowhere, data::kNowhere, text});
  }

  void stop() {
    const WithoutGil free;  // its thread may be about to call back
    dealer_->stop();
  }

  void close() {
    const WithoutGil free;
    dealer_->close();
  }

  nb::dict statistics() const {
    const data::DealerStatistics seen = dealer_->statistics();
    nb::dict out;
    out["records"] = seen.records;
    out["bytes"] = seen.bytes;
    out["input_s"] = static_cast<double>(seen.input_ns) / 1e9;
    out["room_s"] = static_cast<double>(seen.room_ns) / 1e9;
    return out;
  }

 private:
  std::optional<data::Dealer> dealer_;
};

class Receiver {
 public:
  Receiver(int ring, int socket, std::size_t batch, std::string dealer, bool substitute, std::uint64_t bad_limit)
      : receiver_({batch, std::move(dealer), substitute ? data::OnBad::substitute : data::OnBad::raise, bad_limit},
                  ring, duplicate(socket)) {}

  nb::object begin(std::uint64_t epoch, const std::string& file) {
    std::optional<std::vector<std::byte>> record;
    {
      const WithoutGil free;
      record = receiver_.begin(epoch, file, interrupted_);
    }
    if (!record) {
      signals_.rethrow();
      return nb::none();
    }
    return nb::bytes(record->data(), record->size());
  }

  void set_decoder(SharedDecoder decoder, std::vector<nb::object> makers, bool mask, bool numbers, bool reuse) {
    if (makers.size() != decoder->fields().size() + 2) {
      throw nb::value_error("there is a maker for each field, the mask and the numbers");
    }
    batches_.emplace(Presentation{decoder->fields(), std::move(makers), mask, numbers, reuse});
    receiver_.set_decoder(std::move(decoder));
  }

  nb::object next() {
    if (!batches_) {
      throw nb::value_error("set_decoder() was not called");
    }
    batches_->collect();
    data::Lease lease;
    {
      const WithoutGil free;
      lease = receiver_.next(interrupted_);
    }
    if (lease == nullptr) {
      signals_.rethrow();
      return nb::none();
    }
    return batches_->present(std::move(lease));
  }

  bool ended() const { return receiver_.ended(); }
  std::uint64_t steps() const { return receiver_.steps(); }

  nb::dict statistics() const {
    const data::ReceiverStatistics& seen = receiver_.statistics();
    nb::dict out;
    out["batches"] = seen.batches;
    out["records"] = seen.records;
    out["substituted"] = seen.substituted;
    out["first_bad"] = seen.first_bad;
    out["waited_s"] = static_cast<double>(seen.waits_ns) / 1e9;
    return out;
  }

 private:
  data::Receiver receiver_;
  std::optional<Batches> batches_;
  Signals signals_;
  std::function<bool()> interrupted_ = [this] { return signals_(); };
};

SharedDecoder decoder_of(const data::Source& source) {
  SharedDecoder decoder = source.make_stream_decoder();
  if (decoder == nullptr) {
    throw nb::value_error("records of this format can not come through a pipe");
  }
  return decoder;
}

void raise_lost(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const data::StreamLost& error) {
    const nb::object type = nb::module_::import_("launcher.errors").attr("CollectiveError");
    PyErr_SetObject(type.ptr(), nb::make_tuple(error.what(), error.lost() ? "lost" : "left").ptr());
  }
}

}  // namespace

void bind_pipe(nb::module_& module) {
  using namespace nb::literals;
  nb::register_exception_translator(raise_lost, nullptr);
  module.def(
      "make_ring",
      [](std::size_t bytes) {
        Descriptor memory = data::Ring::create(bytes);
        return memory.release();
      },
      "bytes"_a);

  nb::class_<data::StreamDecoder>(module, "StreamDecoder").def_prop_ro("fields", [](const data::StreamDecoder& self) {
    return described(self.fields());
  });
  module.def("stream_decoder", &decoder_of, "source"_a);
  module.def(
      "attributes_decoder",
      [](const std::vector<FieldTuple>& fields, const std::string& dialect) {
        return data::stream_decoder(data::AttributesCodec(fields_of(fields), dialect_of(dialect)));
      },
      "fields"_a, "dialect"_a = "auto");
  module.def(
      "fixed_decoder",
      [](const std::vector<FieldTuple>& fields, const std::vector<std::size_t>& offsets, std::size_t stride) {
        return data::stream_decoder(data::FixedCodec(fields_of(fields), offsets, stride));
      },
      "fields"_a, "offsets"_a, "stride"_a);

  module.def("stream_cursor", &data::stream_cursor, "decoder"_a);
  module.def("cursor_decoder", &data::cursor_decoder, "cursor"_a, "source"_a);

  nb::class_<Dealer>(module, "StreamDealer")
      .def(nb::init<const std::vector<int>&, const std::vector<int>&, const std::string&, std::size_t, const TextRules&,
                    std::uint64_t, std::uint64_t, std::uint64_t, int, std::size_t, std::size_t, std::uint64_t,
                    nb::object>(),
           "rings"_a, "sockets"_a, "framing"_a, "unit"_a, "text"_a, "batch"_a, "world"_a, "first"_a, "tail"_a,
           "window"_a, "window_bytes"_a, "seed"_a, "agree"_a = nb::none())
      .def("start", &Dealer::start, "path"_a, "channel"_a, "epoch"_a, "timeout_s"_a, "skip"_a, "gzip"_a)
      .def("refuse", &Dealer::refuse, "file"_a, "text"_a)
      .def("stop", &Dealer::stop)
      .def("close", &Dealer::close)
      .def("statistics", &Dealer::statistics);

  nb::class_<Receiver>(module, "StreamReceiver")
      .def(nb::init<int, int, std::size_t, std::string, bool, std::uint64_t>(), "ring"_a, "socket"_a, "batch"_a,
           "dealer"_a, "substitute"_a = false, "bad_limit"_a = 0)
      .def("begin", &Receiver::begin, "epoch"_a, "file"_a)
      .def("set_decoder", &Receiver::set_decoder, "decoder"_a, "makers"_a, "mask"_a, "numbers"_a = false,
           "reuse"_a = false)
      .def("next", &Receiver::next)
      .def_prop_ro("ended", &Receiver::ended)
      .def_prop_ro("steps", &Receiver::steps)
      .def("statistics", &Receiver::statistics);
}

}  // namespace launcher::python
