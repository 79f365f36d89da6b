#include <dlfcn.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels.h"
#include "module.h"

namespace launcher::python {
namespace {

namespace collectives = launcher::collectives;
using Address = std::uintptr_t;
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr std::size_t kHeader = 32;
// How long a wait only polls, then yields the processor between polls, before it sleeps between them.
constexpr auto kPolls = microseconds(500);
constexpr auto kYields = milliseconds(50);
constexpr auto kSleep = microseconds(200);
constexpr auto kSignals = milliseconds(50);
constexpr int kPollsBetweenLooks = 64;

// MPI as the library exports it. Handles are pointers in one MPI and int in another: both travel in one register, and
// requests are kept in eight bytes.
struct Functions {
  using Handle = std::uintptr_t;
  int (*isend)(const void*, int, Handle, int, int, Handle, void*);
  int (*irecv)(void*, int, Handle, int, int, Handle, void*);
  int (*test)(void*, int*, void*);
  int (*cancel)(void*);
};

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = ::dlsym(library, name);
  if (symbol == nullptr) {
    throw std::runtime_error(std::string(name) + " is not in the MPI that mpi4py has loaded");
  }
  function = reinterpret_cast<Function>(symbol);
}

// What a wait came to. `peer`: who is to blame; `header`: what a peer has sent in place of what was expected.
struct Outcome {
  const char* kind = "";  // "" (all well), "timeout", "notice" or "mismatch"
  int peer = -1;
  std::string header;
};

class MpiChannel {
 public:
  // `extension`: mpi4py's module, which is linked to the MPI in use.
  MpiChannel(const std::string& extension, std::uintptr_t communicator, std::uintptr_t byte)
      : communicator_(communicator), byte_(byte) {
    void* library = ::dlopen(extension.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) {
      throw std::runtime_error("mpi4py's module " + extension + " is not loaded");
    }
    find(library, "MPI_Isend", mpi_.isend);
    find(library, "MPI_Irecv", mpi_.irecv);
    find(library, "MPI_Test", mpi_.test);
    find(library, "MPI_Cancel", mpi_.cancel);
  }

  int isend(int peer, Address address, std::size_t nbytes, int lane) {
    Request& request = fresh(peer, false);
    check(mpi_.isend(reinterpret_cast<const void*>(address), static_cast<int>(nbytes), byte_, peer, lane, communicator_,
                     request.handle.data()),
          "MPI_Isend");
    return request.number;
  }

  int irecv(int peer, Address address, std::size_t nbytes, int lane) {
    Request& request = fresh(peer, true);
    check(mpi_.irecv(reinterpret_cast<void*>(address), static_cast<int>(nbytes), byte_, peer, lane, communicator_,
                     request.handle.data()),
          "MPI_Irecv");
    return request.number;
  }

  bool test(int number) { return done(requests_[static_cast<std::size_t>(number)]); }

  void watch(std::vector<int> numbers) { watched_ = std::move(numbers); }

  Outcome wait(const std::vector<int>& numbers, double limit_s) {
    for (const int number : numbers) {
      if (const Outcome outcome = wait_for(number, limit_s); *outcome.kind != '\0') {
        return outcome;
      }
    }
    return {};
  }

  // Mailboxes: `count` receives of a header and `room` bytes are kept posted for each peer, one after the other from
  // `base`; what is sent lies after them, `count` pieces too.
  void open_boxes(const std::vector<int>& peers, Address base, std::size_t room, int count, int lane) {
    room_ = room;
    lane_ = lane;
    const std::size_t stride = box_bytes(room);
    for (const int peer : peers) {
      for (int box = 0; box < count; ++box, base += stride) {
        boxes_[peer].push_back({base, irecv(peer, base, kHeader + room, lane)});
      }
    }
    out_ = base;
  }

  static std::size_t box_bytes(std::size_t room) noexcept { return (kHeader + room + 127) / 128 * 128; }

  void mail(std::string_view header, Address address, std::size_t nbytes, const std::vector<int>& peers) {
    std::size_t at = 0;
    Address out = out_;
    do {
      const std::size_t length = std::min(room_, nbytes - at);
      std::memcpy(reinterpret_cast<void*>(out), header.data(), kHeader);
      std::memcpy(reinterpret_cast<void*>(out + kHeader), reinterpret_cast<const void*>(address + at), length);
      for (const int peer : peers) {
        mailed_.push_back(isend(peer, out, kHeader + length, lane_));
      }
      at += length;
      out += box_bytes(room_);
    } while (at < nbytes);
  }

  // The next message of `peer`, of `nbytes`, to `target`.
  Outcome fetch(std::string_view header, int peer, Address target, std::size_t nbytes, double limit_s) {
    std::size_t at = 0;
    do {
      const std::size_t length = std::min(room_, nbytes - at);
      if (Outcome outcome = next(header, peer, limit_s); *outcome.kind != '\0') {
        return outcome;
      }
      std::memcpy(reinterpret_cast<void*>(target + at), reinterpret_cast<const void*>(front(peer)), length);
      post_again(peer);
      at += length;
    } while (at < nbytes);
    return {};
  }

  // Mails `own` to all `order` but -1, which is this rank, and folds what all of them have sent, in this order.
  Outcome fold(std::string_view header, Address own, Address target, std::size_t count, int dtype, int op, double scale,
               std::uint64_t divisor, const std::vector<int>& order, double limit_s) {
    const auto reduce = collectives::reduce_function(static_cast<collectives::DType>(dtype),
                                                     static_cast<collectives::ReduceOp>(op), collectives::isa());
    if (reduce == nullptr) {
      throw std::invalid_argument("this operation is not defined for this type");
    }
    const std::size_t item = collectives::size_of(static_cast<collectives::DType>(dtype));
    const std::size_t nbytes = count * item;
    std::vector<int> peers;
    for (const int peer : order) {
      if (peer >= 0) {
        peers.push_back(peer);
      }
    }
    mail(header, own, nbytes, peers);  // copied: `own` may be `target`
    std::vector<const void*> sources(order.size());
    for (std::size_t at = 0; at < nbytes; at += room_) {
      for (std::size_t index = 0; index < order.size(); ++index) {
        if (order[index] < 0) {
          sources[index] = reinterpret_cast<const void*>(own + at);
          continue;
        }
        if (Outcome outcome = next(header, order[index], limit_s); *outcome.kind != '\0') {
          return outcome;
        }
        sources[index] = reinterpret_cast<const void*>(front(order[index]));
      }
      void* to = reinterpret_cast<void*>(target + at);
      reduce(&to, 1, sources.data(), sources.size(), std::min(room_, nbytes - at) / item, nullptr, {scale, divisor});
      for (const int peer : peers) {
        post_again(peer);
      }
    }
    return sent(limit_s);
  }

  Outcome sent(double limit_s) {
    const Outcome outcome = wait(mailed_, limit_s);
    mailed_.clear();
    return outcome;
  }

  // No memory is written to any more.
  void close() {
    watched_.clear();
    for (Request& request : requests_) {
      if (request.receive && request.used && !done(request)) {
        mpi_.cancel(request.handle.data());
        while (!done(request)) {
        }
      }
    }
  }

 private:
  struct Request {
    alignas(8) std::array<unsigned char, 8> handle{};
    int number = 0;
    int peer = -1;
    bool receive = false;
    bool used = false;
    bool done = false;
  };
  struct Box {
    Address address;
    int number;
  };

  Request& fresh(int peer, bool receive) {
    if (free_.empty()) {
      requests_.emplace_back();
      requests_.back().number = static_cast<int>(requests_.size()) - 1;
      free_.push_back(requests_.back().number);
    }
    Request& request = requests_[static_cast<std::size_t>(free_.back())];
    free_.pop_back();
    request.peer = peer;
    request.receive = receive;
    request.used = true;
    request.done = false;
    return request;
  }

  static void check(int status, const char* function) {
    if (status != 0) {
      throw std::runtime_error(std::string(function) + " has failed with code " + std::to_string(status));
    }
  }

  bool done(Request& request) {
    if (!request.done) {
      int flag = 0;
      check(mpi_.test(request.handle.data(), &flag, status_.data()), "MPI_Test");
      request.done = flag != 0;
    }
    return request.done;
  }

  void let_go(Request& request) {
    request.used = false;
    free_.push_back(request.number);
  }

  Outcome wait_for(int number, double limit_s) {
    Request& request = requests_[static_cast<std::size_t>(number)];
    if (!done(request)) {
      if (const Outcome outcome = poll(request, limit_s); *outcome.kind != '\0') {
        return outcome;
      }
    }
    let_go(request);
    return {};
  }

  Outcome poll(Request& request, double limit_s) {
    const auto began = Clock::now();
    const auto end =
        began + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(limit_s, 1e9)));
    auto signals = began + kSignals;
    for (;;) {
      for (int index = 0; index < kPollsBetweenLooks; ++index) {
        if (done(request)) {
          return {};
        }
      }
      for (const int number : watched_) {
        Request& notice = requests_[static_cast<std::size_t>(number)];
        if (done(notice)) {
          return {"notice", notice.peer, ""};
        }
      }
      const auto now = Clock::now();
      if (now > end) {
        return {"timeout", request.peer, ""};
      }
      if (now > signals) {
        if (::syscall(SYS_gettid) == ::getpid()) {  // handlers run on the main thread only
          nb::gil_scoped_acquire locked;
          if (PyErr_CheckSignals() != 0) {
            throw nb::python_error();
          }
        }
        signals = now + kSignals;
      }
      if (now - began > kYields) {
        std::this_thread::sleep_for(kSleep);
      } else if (now - began > kPolls) {
        ::sched_yield();
      }
    }
  }

  // Waits for the next piece of `peer` and looks at its header; it lies at front(peer).
  Outcome next(std::string_view header, int peer, double limit_s) {
    const Box box = boxes_[peer].front();
    Request& request = requests_[static_cast<std::size_t>(box.number)];
    if (!done(request)) {
      if (Outcome outcome = poll(request, limit_s); *outcome.kind != '\0') {
        return outcome;
      }
    }
    const auto* theirs = reinterpret_cast<const char*>(box.address);
    if (std::memcmp(theirs, header.data(), kHeader) != 0) {
      return {"mismatch", peer, std::string(theirs, kHeader)};
    }
    return {};
  }

  Address front(int peer) { return boxes_[peer].front().address + kHeader; }

  void post_again(int peer) {
    std::deque<Box>& boxes = boxes_[peer];
    Box box = boxes.front();
    boxes.pop_front();
    let_go(requests_[static_cast<std::size_t>(box.number)]);
    box.number = irecv(peer, box.address, kHeader + room_, lane_);
    boxes.push_back(box);
  }

  Functions mpi_{};
  std::uintptr_t communicator_;
  std::uintptr_t byte_;
  std::deque<Request> requests_;
  std::vector<int> free_;
  std::vector<int> watched_;
  std::vector<int> mailed_;
  std::map<int, std::deque<Box>> boxes_;
  Address out_ = 0;
  std::size_t room_ = 0;
  int lane_ = 0;
  alignas(16) std::array<unsigned char, 256> status_{};  // more than any MPI's MPI_Status
};

nb::object told(const Outcome& outcome) {
  if (*outcome.kind == '\0') {
    return nb::none();
  }
  return nb::make_tuple(outcome.kind, outcome.peer, nb::bytes(outcome.header.data(), outcome.header.size()));
}

std::string_view header_of(const nb::bytes& header) {
  if (header.size() != kHeader) {
    throw std::invalid_argument("a header has " + std::to_string(kHeader) + " bytes");
  }
  return {header.c_str(), kHeader};
}

// Runs `work` without the GIL.
template <typename Work>
nb::object unlocked(Work&& work) {
  Outcome outcome;
  {
    nb::gil_scoped_release free;
    outcome = work();
  }
  return told(outcome);
}

}  // namespace

void bind_mpi(nb::module_& module) {
  using nb::arg;
  nb::class_<MpiChannel>(module, "MpiChannel",
                         "Point-to-point messages of an MPI communicator; see launcher.collectives.leg_mpi. What waits "
                         "returns None, or (kind, peer, header) of what came in between.")
      .def(nb::init<const std::string&, std::uintptr_t, std::uintptr_t>(), arg("extension"), arg("communicator"),
           arg("byte"))
      .def("isend", &MpiChannel::isend, arg("peer"), arg("address"), arg("nbytes"), arg("lane"))
      .def("irecv", &MpiChannel::irecv, arg("peer"), arg("address"), arg("nbytes"), arg("lane"))
      .def("test", &MpiChannel::test, arg("number"))
      .def("watch", &MpiChannel::watch, arg("numbers"))
      .def(
          "wait",
          [](MpiChannel& self, const std::vector<int>& numbers, double limit_s) {
            return unlocked([&] { return self.wait(numbers, limit_s); });
          },
          arg("numbers"), arg("limit_s"))
      .def_static("box_bytes", &MpiChannel::box_bytes, arg("room"))
      .def("open_boxes", &MpiChannel::open_boxes, arg("peers"), arg("base"), arg("room"), arg("count"), arg("lane"))
      .def(
          "mail",
          [](MpiChannel& self, const nb::bytes& header, Address address, std::size_t nbytes,
             const std::vector<int>& peers) {
            const std::string_view text = header_of(header);
            nb::gil_scoped_release free;
            self.mail(text, address, nbytes, peers);
          },
          arg("header"), arg("address"), arg("nbytes"), arg("peers"))
      .def(
          "fetch",
          [](MpiChannel& self, const nb::bytes& header, int peer, Address target, std::size_t nbytes, double limit_s) {
            const std::string_view text = header_of(header);
            return unlocked([&] { return self.fetch(text, peer, target, nbytes, limit_s); });
          },
          arg("header"), arg("peer"), arg("target"), arg("nbytes"), arg("limit_s"))
      .def(
          "fold",
          [](MpiChannel& self, const nb::bytes& header, Address own, Address target, std::size_t count, int dtype,
             int op, double scale, std::uint64_t divisor, const std::vector<int>& order, double limit_s) {
            const std::string_view text = header_of(header);
            return unlocked(
                [&] { return self.fold(text, own, target, count, dtype, op, scale, divisor, order, limit_s); });
          },
          arg("header"), arg("own"), arg("target"), arg("count"), arg("dtype"), arg("op"), arg("scale"), arg("divisor"),
          arg("order"), arg("limit_s"))
      .def(
          "sent", [](MpiChannel& self, double limit_s) { return unlocked([&] { return self.sent(limit_s); }); },
          arg("limit_s"))
      .def("close", &MpiChannel::close);
}

}  // namespace launcher::python
