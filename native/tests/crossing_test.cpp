// Legs between hosts that are threads of this process, over the loopback interface.
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "launcher/collectives.h"
#include "leg.h"
#include "network.h"

namespace {

using namespace launcher::crossing;
namespace collectives = launcher::collectives;

class Hosts {
 public:
  explicit Hosts(int count, std::chrono::nanoseconds timeout = std::chrono::seconds(20)) {
    for (int rank = 0; rank < count; ++rank) {
      Options options;
      options.group = "test";
      options.rank = rank;
      options.size = count;
      options.host = "127.0.0.1";
      options.timeout = timeout;
      legs_.push_back(std::make_unique<Leg>(std::move(options)));
    }
    each([&](int rank) {
      std::vector<Endpoint> peers;
      std::vector<int> column;
      for (int other = 0; other < count; ++other) {
        column.push_back(other);
        if (other != rank) {
          peers.push_back(legs_[static_cast<std::size_t>(other)]->own());
          peers.back().who = "rank " + std::to_string(other);
        }
      }
      leg(rank).connect(peers, 2);
      leg(rank).set_column(column, static_cast<std::size_t>(rank), kCallBytes);
    });
  }

  Leg& leg(int rank) { return *legs_[static_cast<std::size_t>(rank)]; }
  int count() const { return static_cast<int>(legs_.size()); }

  void each(const std::function<void(int)>& work) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < count(); ++rank) {
      threads.emplace_back([&work, rank] {
        try {
          work(rank);
        } catch (const std::exception& error) {
          std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
          ++check::failures;
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }

 private:
  std::vector<std::unique_ptr<Leg>> legs_;
};

Plan sum_plan(double prescale = 1.0, double scale = 1.0) {
  Plan plan;
  plan.header.operation = 1;
  plan.item = sizeof(float);
  plan.fold = collectives::reduce_function(collectives::DType::float32, collectives::ReduceOp::sum, collectives::isa());
  plan.prescale = prescale;
  plan.finish.scale = scale;
  return plan;
}

float value(int rank, std::size_t index) {
  return static_cast<float>((index * 7 + static_cast<std::size_t>(rank)) % 61);
}

void sums(int count) {
  Hosts hosts(count);
  hosts.each([&](int rank) {
    std::uint64_t sequence = 0;
    for (const std::size_t elements : {std::size_t{1}, std::size_t{257}, std::size_t{12'289}, std::size_t{16'384},
                                       std::size_t{16'385}, std::size_t{100'003}, std::size_t{1'500'001}}) {
      for (const bool in_place : {true, false}) {
        std::vector<float> source(elements);
        for (std::size_t index = 0; index < elements; ++index) {
          source[index] = value(rank, index);
        }
        std::vector<float> other(in_place ? 0 : elements);
        float* const target = in_place ? source.data() : other.data();
        const Plan plan = in_place ? sum_plan() : sum_plan(2.0, 0.25);
        hosts.leg(rank).allreduce(plan, ++sequence, source.data(), target, elements);
        std::size_t wrong = 0;
        for (std::size_t index = 0; index < elements; ++index) {
          float wanted = 0;
          for (int peer = 0; peer < hosts.count(); ++peer) {
            wanted += value(peer, index);
          }
          wrong += target[index] != (in_place ? wanted : wanted / 2) ? 1 : 0;
        }
        CHECK(wrong == 0);
      }
    }
  });
}

// Messages that are longer than a piece, in both directions, posted late and early.
void messages() {
  Hosts hosts(2);
  constexpr std::size_t kBytes = 1'000'003;
  hosts.each([&](int rank) {
    const int peer = 1 - rank;
    const auto rows = static_cast<std::uint32_t>(Lane::rows);
    std::vector<std::vector<std::byte>> out;
    std::vector<std::vector<std::byte>> in(5, std::vector<std::byte>(kBytes));
    std::vector<Pending> requests;
    for (std::size_t index = 0; index < in.size(); ++index) {
      out.emplace_back(kBytes - index, static_cast<std::byte>(index + static_cast<std::size_t>(rank) * 10));
      requests.push_back(hosts.leg(rank).send(peer, out[index].data(), out[index].size(), rows));
    }
    for (std::vector<std::byte>& one : in) {
      requests.push_back(hosts.leg(rank).receive(peer, one.data(), one.size(), rows));
    }
    hosts.leg(rank).wait(requests);
    for (std::size_t index = 0; index < in.size(); ++index) {
      const auto wanted = static_cast<std::byte>(index + static_cast<std::size_t>(peer) * 10);
      CHECK(in[index].front() == wanted && in[index][kBytes - index - 1] == wanted);
      CHECK(index == 0 || in[index].back() == std::byte{0});
    }
  });
}

void other_calls() {
  Hosts hosts(2);
  std::vector<float> data(100'000);
  hosts.each([&](int rank) {
    std::vector<float> own(data);
    try {
      hosts.leg(rank).allreduce(sum_plan(), rank == 0 ? 1 : 2, own.data(), own.data(), own.size());
      CHECK(false);
    } catch (const CallMismatch& error) {
      CHECK(error.peer() == 1 - rank && error.theirs().sequence == (rank == 0 ? 2 : 1));
    }
  });
}

void ends() {
  Hosts hosts(3, std::chrono::milliseconds(300));
  hosts.each([&](int rank) {
    std::vector<float> own(64);
    if (rank == 2) {
      const std::string text = "no more data";
      hosts.leg(2).give_up(std::as_bytes(std::span(text)), false);
      CHECK_THROWS(LegFailure, hosts.leg(2).allreduce(sum_plan(), 1, own.data(), own.data(), own.size()));
      return;
    }
    try {
      hosts.leg(rank).allreduce(sum_plan(), 1, own.data(), own.data(), own.size());
      CHECK(false);
    } catch (const LegFailure& error) {
      CHECK(error.peer() == 2 && error.kind() == Kind::notice);
    }
    const std::vector<std::byte> notice = hosts.leg(rank).notice_of(2, std::chrono::seconds(5));
    CHECK(notice.size() == 12 && std::memcmp(notice.data(), "no more data", 12) == 0);
  });
}

void late() {
  Hosts hosts(2, std::chrono::milliseconds(200));
  std::vector<float> own(64);
  try {
    hosts.leg(0).allreduce(sum_plan(), 1, own.data(), own.data(), own.size());
    CHECK(false);
  } catch (const LegFailure& error) {
    CHECK(error.peer() == 1 && error.kind() == Kind::timeout);
  }
}

// Nobody connects to a rank of a higher number.
void absent() {
  Options options;
  options.group = "test";
  options.size = 2;
  options.host = "127.0.0.1";
  options.timeout = std::chrono::milliseconds(200);
  Leg one(options);
  options.rank = 1;
  const Leg other(options);
  std::vector<Endpoint> peers{other.own()};
  peers[0].who = "rank 1";
  const auto said = [&] {
    try {
      one.connect(peers, 1);
      return std::string("connected");
    } catch (const LegFailure& error) {
      return std::to_string(static_cast<int>(error.kind())) + ' ' + error.what();
    }
  };
  CHECK(said().starts_with(std::to_string(static_cast<int>(Kind::timeout)) + " rank 1 did not connect within 0.2 s"));
  peers[0].host = "no address";
  CHECK(said().starts_with(std::to_string(static_cast<int>(Kind::system)) + " rank 1 listens at an address that"));
}

// A rank that leaves in good order does not disturb those that still wait for another one.
void leaves_in_order() {
  Hosts hosts(3);
  hosts.each([&](int rank) {
    std::byte word{1};
    const auto rows = static_cast<std::uint32_t>(Lane::rows);
    if (rank == 0) {
      std::byte in{};
      const Pending first[] = {hosts.leg(0).receive(1, &in, 1, rows)};
      hosts.leg(0).wait(first);
      const Pending second[] = {hosts.leg(0).receive(2, &in, 1, rows)};
      hosts.leg(0).wait(second);
      CHECK(in == std::byte{1});
      return;
    }
    if (rank == 2) {  // rank 1 has gone when this is sent
      CHECK(!hosts.leg(2).notice_of(1, std::chrono::seconds(10)).empty());
    }
    const Pending sent[] = {hosts.leg(rank).send(0, &word, 1, rows)};
    hosts.leg(rank).wait(sent);
    if (rank == 1) {
      hosts.leg(1).give_up(std::as_bytes(std::span("done")), true);
    }
  });
}

void addresses() {
  CHECK(local_address("lo", "") == "127.0.0.1" || local_address("lo", "") == "::1");
  CHECK_THROWS(std::invalid_argument, local_address("no-such-interface", ""));
  CHECK_THROWS(std::invalid_argument, Address("a name", 1));
  CHECK(Address("::1", 99).port() == 99 && Address("::1", 99).host() == "::1");
}

}  // namespace

int main() {
  check::run("sums of two hosts", [] { sums(2); });
  check::run("sums of three hosts", [] { sums(3); });
  check::run("sums of five hosts", [] { sums(5); });
  check::run("messages", messages);
  check::run("calls that differ", other_calls);
  check::run("a rank that gives up", ends);
  check::run("a rank that does not come", late);
  check::run("a rank that leaves in good order", leaves_in_order);
  check::run("a rank that does not connect", absent);
  check::run("addresses", addresses);
  return check::failures == 0 ? 0 : 1;
}
