#include "engine.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
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
#include "fixed_source.h"
#include "module.h"
#include "transform.h"

namespace launcher::python {
namespace {

using data::Field;
using data::Source;
using SharedSource = std::shared_ptr<const Source>;
using Shape = std::vector<std::uint64_t>;

data::DType to_dtype(int number) {
  if (number < 0 || number >= collectives::kDTypes) {
    throw std::invalid_argument("dtype is " + std::to_string(number) + "; expected a DType, 0 to " +
                                std::to_string(collectives::kDTypes - 1));
  }
  return static_cast<data::DType>(number);
}

SharedSource make_fixed_source(data::Files files, std::vector<std::uint64_t> headers, std::uint64_t stride,
                               const std::vector<std::tuple<std::string, int, Shape, std::uint64_t>>& fields) {
  std::vector<data::FixedField> wanted;
  for (const auto& [name, dtype, shape, offset] : fields) {
    wanted.push_back({{name, data::Kind::fixed, to_dtype(dtype), shape}, offset});
  }
  return data::fixed_source(std::move(files), std::move(headers), stride, std::move(wanted));
}

// Kind, field, dtype, scale, shift, classes.
using GivenChange = std::tuple<int, std::string, int, std::vector<double>, std::vector<double>, std::uint64_t>;

SharedSource make_changed_source(SharedSource source, const std::vector<GivenChange>& given) {
  std::vector<data::Change> changes;
  for (const auto& [kind, field, dtype, scale, shift, classes] : given) {
    if (kind < 0 || kind > 2) {
      throw std::invalid_argument("kind is " + std::to_string(kind) + "; expected 0, 1 or 2");
    }
    changes.push_back({static_cast<data::Change::Kind>(kind), field, to_dtype(dtype), scale, shift, classes});
  }
  return data::changed_source(std::move(source), std::move(changes));
}

template <typename... Arguments>
std::function<void(Arguments...)> callback(nb::object function) {
  if (function.is_none()) {
    return {};
  }
  return [held = hold(std::move(function))](Arguments... arguments) {
    nb::gil_scoped_acquire locked;
    (*held)(arguments...);
  };
}

struct Epoch {
  data::OrderParameters order;
  data::ShareParameters share;
};

Epoch epoch_of(const nb::dict& parameters) {
  const auto number = [&parameters](const char* name) { return nb::cast<std::uint64_t>(parameters[name]); };
  const auto choice = [&parameters](const char* name) {
    const int value = nb::cast<int>(parameters[name]);
    if (value < 0 || value > 2) {
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; expected 0, 1 or 2");
    }
    return value;
  };
  Epoch out;
  out.order = {static_cast<data::Shuffle>(choice("shuffle")),
               number("seed"),
               number("epoch"),
               number("records"),
               number("extent"),
               number("window"),
               number("lanes")};
  const std::int64_t agreed = nb::cast<std::int64_t>(parameters["agreed_steps"]);
  out.share = {out.order.records,
               number("base"),
               number("world"),
               number("rank"),
               number("batch"),
               out.order.lanes,
               static_cast<data::Tail>(choice("tail")),
               agreed < 0 ? data::kNotAgreed : static_cast<std::uint64_t>(agreed)};
  return out;
}

class Engine {
 public:
  Engine(SharedSource source, const nb::dict& epoch, std::vector<nb::object> makers, std::size_t ring,
         std::size_t ring_limit, std::size_t threads, bool substitute, std::uint64_t bad_limit, bool mask, bool numbers,
         bool reuse, double ring_wait, nb::object blocked, nb::object grown, nb::object register_memory,
         nb::object unregister_memory, nb::object fence)
      : batches_(Presentation{source->fields(), std::move(makers), mask, numbers, reuse, std::move(fence)}),
        blocked_(callback<std::size_t>(std::move(blocked))) {
    if (batches_.makers() != source->fields().size() + 2) {
      throw std::invalid_argument("expected a maker for each field, the mask and the record numbers");
    }
    data::EngineOptions options;
    options.ring = ring;
    options.ring_limit = ring_limit;
    options.ring_wait_s = ring_wait;
    options.grown = callback<std::size_t>(std::move(grown));
    options.threads = threads;
    options.on_bad = substitute ? data::OnBad::substitute : data::OnBad::raise;
    options.bad_limit = bad_limit;
    options.register_memory = memory_callback(std::move(register_memory));
    options.unregister_memory = memory_callback(std::move(unregister_memory));
    const Epoch first = epoch_of(epoch);
    const WithoutGil free;
    engine_.emplace(std::move(source), first.order, first.share, std::move(options));
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() { shut(); }

  nb::object next() {
    const Turn turn(*this);
    batches_.collect();
    data::Lease lease;
    {
      const WithoutGil free;
      lease = engine_->next(blocked_, interrupted_);
    }
    if (lease == nullptr) {
      signals_.rethrow();
      return nb::none();
    }
    return batches_.present(std::move(lease));
  }

  void restart(const nb::dict& epoch) {
    const Turn turn(*this);
    batches_.collect();
    const Epoch next = epoch_of(epoch);
    const WithoutGil free;
    engine_->restart(next.order, next.share);
  }

  void close() {
    if (engine_) {
      const Turn turn(*this);
      shut();
      batches_.wait();  // what is lent outlives the engine, but perhaps not for long
    }
  }

  std::uint64_t steps() { return opened().steps(); }
  std::uint64_t step() { return opened().step(); }
  data::EngineStatistics statistics() { return opened().statistics(); }

 private:
  // One call at a time; the GIL makes testing and setting one step.
  class Turn {
   public:
    explicit Turn(Engine& owner) : owner_(owner) {
      if (owner.busy_) {
        throw std::runtime_error("the loader is in a call of another thread; iterate it from one thread at a time");
      }
      static_cast<void>(owner.opened());
      owner.busy_ = true;
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { owner_.busy_ = false; }

   private:
    Engine& owner_;
  };

  static std::function<void(void*, std::size_t)> memory_callback(nb::object function) {
    const auto call = callback<std::uintptr_t, std::size_t>(std::move(function));
    if (!call) {
      return {};
    }
    return [call](void* begin, std::size_t bytes) { call(reinterpret_cast<std::uintptr_t>(begin), bytes); };
  }

  data::Engine& opened() {
    if (!engine_) {
      throw std::runtime_error("the loader is closed");
    }
    return *engine_;
  }

  void shut() {
    if (engine_) {
      const WithoutGil free;  // its threads may be about to call back
      engine_.reset();
    }
  }

  bool busy_ = false;
  Batches batches_;
  Signals signals_;
  std::function<void(std::size_t)> blocked_;
  std::function<bool()> interrupted_ = [this] {
    {
      nb::gil_scoped_acquire locked;
      batches_.collect();  // another thread may have dropped one
    }
    return signals_();
  };
  std::optional<data::Engine> engine_;
};

nb::dict statistics(Engine& engine) {
  const data::EngineStatistics seen = engine.statistics();
  nb::dict out;
  out["batches"] = seen.batches;
  out["records"] = seen.records;
  out["substituted"] = seen.substituted;
  out["first_bad"] = seen.first_bad;
  out["waited_s"] = static_cast<double>(seen.waits_ns) / 1e9;
  out["full_s"] = static_cast<double>(seen.full_ns) / 1e9;
  out["slots"] = seen.slots;
  out["lent"] = seen.lent;
  return out;
}

void raise_forked(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const data::ForkedError& error) {
    const nb::object type = nb::module_::import_("launcher.errors").attr("UsageError");
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace

void bind_engine(nb::module_& module) {
  using namespace nb::literals;
  // A loader that is still there when the process ends is no leak: its memory goes with the process.
  nb::set_leak_warnings(false);
  watch_interpreter();
  nb::register_exception_translator(raise_forked, nullptr);

  nb::class_<Source>(module, "Source")
      .def_prop_ro("records", &Source::records)
      .def_prop_ro("bytes", &Source::bytes)
      .def_prop_ro("fields", [](const Source& self) { return described(self.fields()); });
  module.def("fixed_source", &make_fixed_source, "files"_a, "headers"_a, "stride"_a, "fields"_a);

  module.def("changed_source", &make_changed_source, "source"_a, "changes"_a);

  nb::class_<Engine>(module, "Engine")
      .def(nb::init<SharedSource, const nb::dict&, std::vector<nb::object>, std::size_t, std::size_t, std::size_t, bool,
                    std::uint64_t, bool, bool, bool, double, nb::object, nb::object, nb::object, nb::object,
                    nb::object>(),
           "source"_a, "epoch"_a, "makers"_a, nb::kw_only(), "ring"_a = 4, "ring_limit"_a = 64, "threads"_a = 0,
           "substitute"_a = false, "bad_limit"_a = 0, "mask"_a = false, "numbers"_a = false, "reuse"_a = false,
           "ring_wait"_a = std::numeric_limits<double>::infinity(), "blocked"_a = nb::none(), "grown"_a = nb::none(),
           "register_memory"_a = nb::none(), "unregister_memory"_a = nb::none(), "fence"_a = nb::none())
      .def("next", &Engine::next)
      .def("__iter__", [](nb::handle self) { return nb::borrow(self); })
      .def("__next__",
           [](Engine& self) {
             nb::object batch = self.next();
             if (batch.is_none()) {
               throw nb::stop_iteration();
             }
             return batch;
           })
      .def("restart", &Engine::restart, "epoch"_a)
      .def("close", &Engine::close)
      .def("statistics", &statistics)
      .def_prop_ro("steps", &Engine::steps)
      .def_prop_ro("step", &Engine::step);
}

}  // namespace launcher::python
