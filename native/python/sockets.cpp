#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "launcher/collectives.h"
#include "leg.h"
#include "module.h"
#include "network.h"
#include "waiting.h"

namespace launcher::python {
namespace {

namespace collectives = launcher::collectives;
namespace crossing = launcher::crossing;
using Address = std::uintptr_t;
// Rank, who that is, numeric address, port, what it asks for, what it answers.
using Peer = std::tuple<int, std::string, std::string, int, nb::bytes, nb::bytes>;

void* to_pointer(Address address) noexcept { return reinterpret_cast<void*>(address); }

// As launcher.collectives.legs.LegError documents them.
const char* name_of(crossing::Kind kind) noexcept {
  constexpr const char* names[] = {"lost", "timeout", "mismatch", "notice", "left", "closed", "interrupted", "system"};
  return names[static_cast<std::size_t>(kind)];
}

[[noreturn]] void raise(const nb::object& type, const nb::object& value) {
  PyErr_SetObject(type.ptr(), value.ptr());
  throw nb::python_error();
}

[[noreturn]] void raise(const crossing::LegFailure& error) {
  const nb::object type = nb::module_::import_("launcher.collectives.legs").attr("LegError");
  raise(type, type(error.peer(), name_of(error.kind()), error.what()));
}

[[noreturn]] void raise(const crossing::CallMismatch& error) {
  const nb::module_ module = nb::module_::import_("launcher.collectives.crossing");
  const nb::object type = module.attr("Mismatch");
  const nb::bytes theirs(&error.theirs(), sizeof(crossing::Header));
  raise(type, type(error.peer(), module.attr("HEADER").attr("unpack")(theirs)));
}

[[noreturn]] void raise(const std::system_error& error) {
  const nb::object type = nb::borrow(PyExc_OSError);
  raise(type, type(error.code().value(), error.what()));
}

crossing::Secret to_secret(const nb::bytes& text) {
  crossing::Secret out;
  if (text.size() != out.size()) {
    throw std::invalid_argument("a secret has " + std::to_string(text.size()) + " bytes; expected 16");
  }
  std::memcpy(out.data(), text.c_str(), out.size());
  return out;
}

nb::bytes from_secret(const crossing::Secret& secret) { return nb::bytes(secret.data(), secret.size()); }

crossing::Header to_header(const nb::bytes& text) {
  crossing::Header out;
  if (text.size() != sizeof out) {
    throw std::invalid_argument("a header has " + std::to_string(text.size()) + " bytes; expected 32");
  }
  std::memcpy(&out, text.c_str(), sizeof out);
  return out;
}

// A message under way.
struct Message {
  crossing::Pending request;
};

class SocketLeg {
 public:
  SocketLeg(const std::string& group, int rank, int size, const std::string& host, double timeout_s, int poll_us)
      : timeout_s_(timeout_s), signals_(std::make_shared<Signals>()) {
    crossing::Options options;
    options.group = group;
    options.rank = rank;
    options.size = size;
    options.host = host;
    options.timeout = timeout_of(timeout_s);
    options.poll = std::chrono::microseconds(poll_us);
    options.interrupted = [signals = signals_] { return (*signals)(); };
    leg_ = guarded([&] { return std::make_unique<crossing::Leg>(std::move(options)); });
  }

  SocketLeg(const SocketLeg&) = delete;
  SocketLeg& operator=(const SocketLeg&) = delete;
  ~SocketLeg() {
    if (leg_->forked()) {
      static_cast<void>(leg_.release());  // another thread of the parent may have been changing it
    }
  }

  crossing::Leg& leg() noexcept { return *leg_; }
  double timeout_s() const noexcept { return timeout_s_; }
  void set_timeout_s(double seconds) {
    const auto timeout = timeout_of(seconds);
    unlocked([&] { leg_->set_timeout(timeout); });
    timeout_s_ = seconds;
  }

  // Errors of `work` become Python's.
  template <typename Work>
  auto guarded(Work&& work) -> decltype(work()) {
    try {
      return work();
    } catch (const crossing::LegFailure& error) {
      if (error.kind() == crossing::Kind::interrupted) {
        signals_->rethrow();
      }
      raise(error);
    } catch (const crossing::CallMismatch& error) {
      raise(error);
    } catch (const std::system_error& error) {
      raise(error);
    }
  }

  // The same without the GIL.
  template <typename Work>
  auto unlocked(Work&& work) -> decltype(work()) {
    return guarded([&] {
      const WithoutGil free;
      return work();
    });
  }

 private:
  double timeout_s_;
  std::shared_ptr<Signals> signals_;
  std::unique_ptr<crossing::Leg> leg_;
};

// It may ask a name server.
std::string find_local_address(const std::string& interface, const std::string& toward) {
  try {
    const WithoutGil free;
    return crossing::local_address(interface, toward);
  } catch (const std::system_error& error) {
    raise(error);
  }
}

void connect(SocketLeg& self, const std::vector<Peer>& peers, std::size_t streams) {
  std::vector<crossing::Endpoint> endpoints;
  for (const auto& [rank, who, host, port, asks, answers] : peers) {
    if (port <= 0 || port > 65535) {
      throw std::invalid_argument(who + " listens at port " + std::to_string(port));
    }
    endpoints.push_back({rank, who, host, static_cast<std::uint16_t>(port), to_secret(asks), to_secret(answers)});
  }
  self.unlocked([&] { self.leg().connect(endpoints, streams); });
}

void wait(SocketLeg& self, const nb::iterable& messages) {
  std::vector<crossing::Pending> requests;
  for (const nb::handle one : messages) {
    requests.push_back(nb::cast<Message&>(one).request);
  }
  self.unlocked([&] { self.leg().wait(requests); });
}

crossing::Plan make_plan(int dtype, int op, int fold_op, double prescale, double early, double scale,
                         std::uint64_t divisor) {
  if (dtype < 0 || dtype >= collectives::kDTypes || op < 0 || op >= collectives::kReduceOps || fold_op < 0 ||
      fold_op >= collectives::kReduceOps || divisor == 0) {
    throw std::invalid_argument("dtype is " + std::to_string(dtype) + ", op " + std::to_string(op) + ", divisor " +
                                std::to_string(divisor) + "; expected a DType, a ReduceOp and no divisor 0");
  }
  crossing::Plan plan;
  plan.header.operation = static_cast<std::uint8_t>(collectives::Operation::allreduce);
  plan.header.dtype = static_cast<std::uint8_t>(dtype);
  plan.header.op = static_cast<std::uint8_t>(op);
  plan.item = collectives::size_of(static_cast<collectives::DType>(dtype));
  plan.fold = collectives::reduce_function(static_cast<collectives::DType>(dtype),
                                           static_cast<collectives::ReduceOp>(fold_op), collectives::isa());
  if (plan.fold == nullptr) {
    throw std::invalid_argument("ReduceOp " + std::to_string(fold_op) + " is not defined for DType " +
                                std::to_string(dtype));
  }
  plan.prescale = prescale;
  plan.early = {early, 1};
  plan.finish = {scale, divisor};
  return plan;
}

}  // namespace

void bind_sockets(nb::module_& module) {
  using nb::arg;
  module.def("local_address", &find_local_address, arg("interface"), arg("toward"),
             "The numeric address that other hosts reach this one by; see native/crossing/network.h.");
  nb::class_<Message>(module, "Message", "A message under way.").def_prop_ro("done", [](const Message& self) {
    return self.request->done;
  });
  nb::class_<crossing::Plan>(module, "CrossingPlan", "How an allreduce between hosts is folded.")
      .def(nb::new_(&make_plan), arg("dtype"), arg("op"), arg("fold_op"), arg("prescale"), arg("early"), arg("scale"),
           arg("divisor"));
  nb::class_<SocketLeg>(module, "SocketLeg", "See launcher.collectives.leg_sockets.")
      .def(nb::init<const std::string&, int, int, const std::string&, double, int>(), arg("group"), arg("rank"),
           arg("size"), arg("host"), arg("timeout_s"), arg("poll_us"))
      .def_prop_ro("endpoint",
                   [](SocketLeg& self) {
                     const crossing::Endpoint& own = self.leg().own();
                     return nb::make_tuple(own.host, own.port, from_secret(own.asks), from_secret(own.answers));
                   })
      .def_prop_rw("timeout_s", &SocketLeg::timeout_s, &SocketLeg::set_timeout_s)
      .def_prop_ro("sent_bytes", [](SocketLeg& self) { return self.leg().sent_bytes(); })
      .def_prop_ro("messages", [](SocketLeg& self) { return self.leg().messages(); })
      .def_prop_ro("calls",
                   [](SocketLeg& self) { return nb::make_tuple(self.leg().short_calls(), self.leg().long_calls()); })
      .def("connect", &connect, arg("peers"), arg("streams"))
      .def(
          "connected", [](SocketLeg& self, int peer) { return self.leg().connected(peer); }, arg("peer"))
      .def(
          "set_column",
          [](SocketLeg& self, std::vector<int> ranks, std::size_t host, std::size_t short_bytes) {
            self.unlocked([&] { self.leg().set_column(std::move(ranks), host, short_bytes); });
          },
          arg("ranks"), arg("host"), arg("short_bytes"))
      .def(
          "isend",
          [](SocketLeg& self, int peer, Address address, std::size_t nbytes, std::uint32_t lane) {
            return Message{self.unlocked([&] { return self.leg().send(peer, to_pointer(address), nbytes, lane); })};
          },
          arg("peer"), arg("address"), arg("nbytes"), arg("lane"))
      .def(
          "irecv",
          [](SocketLeg& self, int peer, Address address, std::size_t nbytes, std::uint32_t lane) {
            return Message{self.unlocked([&] { return self.leg().receive(peer, to_pointer(address), nbytes, lane); })};
          },
          arg("peer"), arg("address"), arg("nbytes"), arg("lane"))
      .def("wait", &wait, arg("messages"))
      .def("progress", [](SocketLeg& self) { self.unlocked([&] { self.leg().progress(); }); })
      .def(
          "call",
          [](SocketLeg& self, const nb::bytes& header, Address address, std::size_t nbytes,
             const std::vector<int>& peers) {
            const crossing::Header said = to_header(header);
            self.unlocked([&] { self.leg().call(said, to_pointer(address), nbytes, peers); });
          },
          arg("header"), arg("address"), arg("nbytes"), arg("peers"))
      .def(
          "take",
          [](SocketLeg& self, const nb::bytes& header, int peer, std::size_t nbytes) {
            const crossing::Header wanted = to_header(header);
            return reinterpret_cast<Address>(self.unlocked([&] { return self.leg().take(wanted, peer, nbytes); }));
          },
          arg("header"), arg("peer"), arg("nbytes"))
      .def(
          "free", [](SocketLeg& self, int peer) { self.unlocked([&] { self.leg().free(peer); }); }, arg("peer"))
      .def("flush", [](SocketLeg& self) { self.unlocked([&] { self.leg().flush(); }); })
      .def(
          "allreduce",
          [](SocketLeg& self, const crossing::Plan& plan, std::uint64_t sequence, Address source, Address target,
             std::size_t count) {
            self.unlocked([&] { self.leg().allreduce(plan, sequence, to_pointer(source), to_pointer(target), count); });
          },
          arg("plan"), arg("sequence"), arg("source"), arg("target"), arg("count"))
      .def(
          "notice_of",
          [](SocketLeg& self, int peer, double limit_s) {
            const auto limit = timeout_of(limit_s);
            const std::vector<std::byte> text = self.unlocked([&] { return self.leg().notice_of(peer, limit); });
            return nb::bytes(text.data(), text.size());
          },
          arg("peer"), arg("limit_s"))
      // Beside a call of another thread: it is how such a call is ended.
      .def(
          "give_up",
          [](SocketLeg& self, const nb::bytes& notice, bool orderly) {
            const auto* text = reinterpret_cast<const std::byte*>(notice.c_str());
            const std::vector<std::byte> kept(text, text + notice.size());
            self.unlocked([&] { self.leg().give_up(kept, orderly); });
          },
          arg("notice"), arg("orderly"));
}

}  // namespace launcher::python
