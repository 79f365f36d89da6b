#include "launcher/collectives.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "module.h"
#include "waiting.h"

namespace launcher::python {
namespace {

namespace collectives = launcher::collectives;
using collectives::DType;
using collectives::Failure;
using collectives::Group;
using collectives::GroupError;
using collectives::ReduceOp;
using Address = std::uintptr_t;
using Counts = std::vector<std::size_t>;
using Sequence = nb::typed<nb::sequence, int>;

// As launcher.errors.CollectiveError documents them.
const char* name_of(Failure failure) noexcept {
  constexpr const char* names[] = {"lost", "left", "timeout", "mismatch", "interrupted", "closed", "system"};
  return names[static_cast<std::size_t>(failure)];
}

[[noreturn]] void raise(const GroupError& error) {
  nb::object type = nb::module_::import_("launcher.errors").attr("CollectiveError");
  nb::object value =
      type(error.what(), name_of(error.failure()), error.rank(), error.host(), error.operation(), error.sequence());
  PyErr_SetObject(type.ptr(), value.ptr());
  throw nb::python_error();
}

[[noreturn]] void raise(const std::system_error& error) {
  PyObject* arguments = Py_BuildValue("(is)", error.code().value(), error.what());
  if (arguments != nullptr) {
    PyErr_SetObject(PyExc_OSError, arguments);
    Py_DECREF(arguments);
  }
  throw nb::python_error();
}

DType to_dtype(int number) {
  if (number < 0 || number >= collectives::kDTypes) {
    throw std::invalid_argument("dtype is " + std::to_string(number) + "; expected a DType, 0 to " +
                                std::to_string(collectives::kDTypes - 1));
  }
  return static_cast<DType>(number);
}

ReduceOp to_operation(int number) {
  if (number < 0 || number >= collectives::kReduceOps) {
    throw std::invalid_argument("op is " + std::to_string(number) + "; expected a ReduceOp, 0 to " +
                                std::to_string(collectives::kReduceOps - 1));
  }
  return static_cast<ReduceOp>(number);
}

std::size_t to_count(nb::handle number, const char* what) {
  const Py_ssize_t count = PyNumber_AsSsize_t(number.ptr(), nullptr);  // what does not fit becomes the last that does
  if (count == -1 && PyErr_Occurred() != nullptr) {
    throw nb::python_error();
  }
  constexpr Py_ssize_t most = std::numeric_limits<Py_ssize_t>::max();
  if (count < 0 || count == most) {
    throw std::invalid_argument(std::string(what) + " is " + (count < 0 ? "negative" : "too large") +
                                "; expected a number from 0 to " + std::to_string(most - 1));
  }
  return static_cast<std::size_t>(count);
}

Counts to_counts(const nb::sequence& numbers, const char* what) {
  Counts out;
  out.reserve(nb::len(numbers));
  for (const nb::handle number : numbers) {
    out.push_back(to_count(number, what));
  }
  return out;
}

void* to_pointer(Address address) noexcept { return reinterpret_cast<void*>(address); }

// Runs `work` without the GIL; its errors become Python's.
template <typename Work>
auto unlocked(Signals& signals, Work&& work) {
  try {
    WithoutGil free;
    return work();
  } catch (const GroupError& error) {
    if (error.failure() == Failure::interrupted) {
      signals.rethrow();
    }
    raise(error);
  } catch (const std::system_error& error) {
    raise(error);
  }
}

class LocalGroup {
 public:
  LocalGroup(const std::string& directory, const std::string& name, int rank, int size, std::vector<int> ranks,
             const std::string& host, double timeout_s, nb::object page)
      : page_(std::move(page)), name_(name), timeout_s_(timeout_s), signals_(std::make_shared<Signals>()) {
    collectives::Options options;
    options.directory = directory;
    options.name = name;
    options.rank = rank;
    options.size = size;
    options.ranks = std::move(ranks);
    options.host = host;
    options.timeout = timeout_of(timeout_s);
    options.interrupted = [signals = signals_] { return (*signals)(); };
    options.page = page_.is_none() ? nullptr : nb::cast<StatusPage*>(page_);
    group_ = unlocked(*signals_, [&] { return Group::join(std::move(options)); });
  }

  LocalGroup(const LocalGroup&) = delete;
  LocalGroup& operator=(const LocalGroup&) = delete;

  ~LocalGroup() {
    if (group_ != nullptr) {
      WithoutGil free;
      group_.reset();
    }
  }

  // One call after the other; without the GIL.
  template <typename Work>
  auto call(Work&& work) {
    const Turn turn(*this);
    return unlocked(*signals_, std::forward<Work>(work));
  }

  Group& group() noexcept { return *group_; }
  const std::string& name() const noexcept { return name_; }
  double timeout_s() const noexcept { return timeout_s_; }
  void set_timeout_s(double seconds) {
    const auto timeout = timeout_of(seconds);
    const Turn turn(*this);
    group_->set_timeout(timeout);
    timeout_s_ = seconds;
  }

 private:
  // The GIL makes testing and setting one step.
  class Turn {
   public:
    explicit Turn(LocalGroup& owner) : owner_(owner) {
      if (owner.busy_) {
        throw std::runtime_error("group '" + owner.name_ +
                                 "' is in a call of another thread: one thread at a time (see "
                                 "launcher.collectives.executor)");
      }
      owner.busy_ = true;
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { owner_.busy_ = false; }

   private:
    LocalGroup& owner_;
  };

  nb::object page_;  // the group writes to it
  std::string name_;
  double timeout_s_;
  bool busy_ = false;
  std::shared_ptr<Signals> signals_;
  std::unique_ptr<Group> group_;
};

void allreduce(LocalGroup& self, Address source, Address target, nb::handle count, int dtype, int op, double prescale,
               double postscale) {
  const collectives::Piece piece{to_pointer(source), to_pointer(target), to_count(count, "count")};
  const DType type = to_dtype(dtype);
  const ReduceOp operation = to_operation(op);
  self.call([&] { self.group().allreduce(std::span(&piece, 1), type, operation, {prescale, postscale}); });
}

void allreduce_coalesced(LocalGroup& self, const std::vector<Address>& sources, const std::vector<Address>& targets,
                         const Sequence& lengths, int dtype, int op, double prescale, double postscale) {
  const Counts counts = to_counts(lengths, "a number in counts");
  if (sources.size() != targets.size() || sources.size() != counts.size()) {
    throw std::invalid_argument("allreduce_coalesced got " + std::to_string(sources.size()) + " sources, " +
                                std::to_string(targets.size()) + " targets and " + std::to_string(counts.size()) +
                                " counts; expected one of each per piece");
  }
  std::vector<collectives::Piece> pieces;
  pieces.reserve(sources.size());
  for (std::size_t index = 0; index < sources.size(); ++index) {
    pieces.push_back({to_pointer(sources[index]), to_pointer(targets[index]), counts[index]});
  }
  const DType type = to_dtype(dtype);
  const ReduceOp operation = to_operation(op);
  self.call([&] { self.group().allreduce(pieces, type, operation, {prescale, postscale}); });
}

void reduce_scatter(LocalGroup& self, Address source, Address target, const Sequence& shares, int dtype, int op,
                    double prescale, double postscale) {
  const Counts counts = to_counts(shares, "a number in counts");
  const DType type = to_dtype(dtype);
  const ReduceOp operation = to_operation(op);
  self.call([&] {
    self.group().reduce_scatter(to_pointer(source), to_pointer(target), counts, type, operation, {prescale, postscale});
  });
}

void all_gather(LocalGroup& self, Address source, Address target, const Sequence& shares, int dtype) {
  const Counts counts = to_counts(shares, "a number in counts");
  const DType type = to_dtype(dtype);
  self.call([&] { self.group().all_gather(to_pointer(source), to_pointer(target), counts, type); });
}

void broadcast(LocalGroup& self, Address pointer, nb::handle count, int dtype, int root) {
  const std::size_t elements = to_count(count, "count");
  const DType type = to_dtype(dtype);
  self.call([&] { self.group().broadcast(to_pointer(pointer), elements, type, root); });
}

void reduce(LocalGroup& self, Address source, Address target, nb::handle count, int dtype, int root, int op,
            double prescale, double postscale) {
  const std::size_t elements = to_count(count, "count");
  const DType type = to_dtype(dtype);
  const ReduceOp operation = to_operation(op);
  self.call([&] {
    self.group().reduce(to_pointer(source), to_pointer(target), elements, type, operation, root, {prescale, postscale});
  });
}

void all_to_all(LocalGroup& self, Address source, Address target, const Sequence& send_counts,
                const Sequence& receive_counts, int dtype) {
  const Counts sent = to_counts(send_counts, "a number in send_counts");
  const Counts received = to_counts(receive_counts, "a number in receive_counts");
  const DType type = to_dtype(dtype);
  self.call([&] { self.group().all_to_all(to_pointer(source), to_pointer(target), sent, received, type); });
}

constexpr std::pair<const char*, collectives::Path> kPaths[] = {
    {"automatic", collectives::Path::automatic}, {"small", collectives::Path::small},
    {"pipelined", collectives::Path::pipelined}, {"shared", collectives::Path::shared},
    {"pulled", collectives::Path::pulled},
};

void set_path(LocalGroup& self, const std::string& name) {
  for (const auto& [known, path] : kPaths) {
    if (name == known) {
      self.call([&self, path = path] { self.group().set_path(path); });
      return;
    }
  }
  throw std::invalid_argument("path is '" + name + "'; expected automatic, small, pipelined, shared or pulled");
}

nb::dict statistics(LocalGroup& self) {
  const collectives::Statistics seen = self.group().statistics();
  nb::dict calls;
  nb::dict bytes;
  for (const auto& [name, path] : kPaths) {
    if (path != collectives::Path::automatic) {
      calls[name] = seen.calls[static_cast<std::size_t>(path)];
      bytes[name] = seen.bytes[static_cast<std::size_t>(path)];
    }
  }
  nb::dict out;
  out["calls"] = calls;
  out["bytes"] = bytes;
  out["waited_s"] = static_cast<double>(seen.waited_ns) / 1e9;
  out["ping_ns"] = seen.ping_ns;
  out["chunk_bytes"] = seen.chunk_bytes;
  out["can_pull"] = seen.can_pull;
  out["spin"] = seen.spin;
  return out;
}

std::string describe(LocalGroup& self) {
  return "LocalGroup('" + self.name() + "', rank " + std::to_string(self.group().rank()) + " of " +
         std::to_string(self.group().size()) + ")";
}

}  // namespace

void bind_collectives(nb::module_& module) {
  using nb::arg;
  // A group that is still there when the process ends is no leak: its memory goes with the process.
  nb::set_leak_warnings(false);
  watch_interpreter();

  nb::class_<LocalGroup>(module, "LocalGroup", "Ranks of one host; see launcher.collectives.group.Group.")
      .def(nb::init<const std::string&, const std::string&, int, int, std::vector<int>, const std::string&, double,
                    nb::object>(),
           arg("directory"), arg("name"), arg("rank"), arg("size"), nb::kw_only(), arg("ranks") = std::vector<int>(),
           arg("host") = "", arg("timeout_s") = 1800.0, arg("status_page") = nb::none())
      .def_prop_ro("name", &LocalGroup::name)
      .def_prop_ro("rank", [](LocalGroup& self) { return self.group().rank(); })
      .def_prop_ro("size", [](LocalGroup& self) { return self.group().size(); })
      .def_prop_ro("sequence", [](LocalGroup& self) { return self.group().sequence(); })
      .def_prop_rw("timeout_s", &LocalGroup::timeout_s, &LocalGroup::set_timeout_s)
      .def("allreduce", &allreduce, arg("source"), arg("target"), arg("count"), arg("dtype"), arg("op") = 0,
           arg("prescale") = 1.0, arg("postscale") = 1.0)
      .def("allreduce_coalesced", &allreduce_coalesced, arg("sources"), arg("targets"), arg("counts"), arg("dtype"),
           arg("op") = 0, arg("prescale") = 1.0, arg("postscale") = 1.0)
      .def("reduce_scatter", &reduce_scatter, arg("source"), arg("target"), arg("counts"), arg("dtype"), arg("op") = 0,
           arg("prescale") = 1.0, arg("postscale") = 1.0)
      .def("all_gather", &all_gather, arg("source"), arg("target"), arg("counts"), arg("dtype"))
      .def("broadcast", &broadcast, arg("pointer"), arg("count"), arg("dtype"), arg("root"))
      .def("reduce", &reduce, arg("source"), arg("target"), arg("count"), arg("dtype"), arg("root"), arg("op") = 0,
           arg("prescale") = 1.0, arg("postscale") = 1.0)
      .def("all_to_all", &all_to_all, arg("source"), arg("target"), arg("send_counts"), arg("receive_counts"),
           arg("dtype"))
      .def("barrier", [](LocalGroup& self) { self.call([&self] { self.group().barrier(); }); })
      .def(
          "allocate",
          [](LocalGroup& self, nb::handle nbytes) {
            const std::size_t bytes = to_count(nbytes, "nbytes");
            return self.call([&] { return reinterpret_cast<Address>(self.group().allocate(bytes)); });
          },
          arg("nbytes"))
      .def(
          "release",
          [](LocalGroup& self, Address address) { self.call([&] { self.group().release(to_pointer(address)); }); },
          arg("address"))
      .def(
          "register",
          [](LocalGroup& self, Address address, nb::handle nbytes, int fd) {
            const std::size_t bytes = to_count(nbytes, "nbytes");
            self.call([&] { self.group().register_memory(to_pointer(address), bytes, fd); });
          },
          arg("address"), arg("nbytes"), arg("fd"))
      .def(
          "unregister",
          [](LocalGroup& self, Address address) {
            self.call([&] { self.group().unregister_memory(to_pointer(address)); });
          },
          arg("address"))
      .def("statistics", &statistics)
      .def("set_path", &set_path, arg("name"))
      // Beside a call of another thread: it is how such a call is ended.
      .def(
          "abort", [](LocalGroup& self, const std::string& reason) { self.group().abort(reason); }, arg("reason"))
      .def("close", [](LocalGroup& self) { self.call([&self] { self.group().close(); }); })
      .def("__repr__", &describe);
}

}  // namespace launcher::python
