#include "order.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "module.h"
#include "share.h"

namespace launcher::python {
namespace {

using data::Order;
using Numbers = std::vector<std::uint64_t>;

Order make_order(int shuffle, std::uint64_t seed, std::uint64_t epoch, std::uint64_t records, std::uint64_t extent,
                 std::uint64_t window, std::uint64_t lanes) {
  if (shuffle < 0 || shuffle > 2) {
    throw std::invalid_argument("shuffle is " + std::to_string(shuffle) + "; expected 0 (none), 1 (full), 2 (blocks)");
  }
  return Order({static_cast<data::Shuffle>(shuffle), seed, epoch, records, extent, window, lanes});
}

std::uint64_t at(const Order& order, std::uint64_t position) {
  const std::uint64_t records = order.parameters().records;
  if (position >= records) {
    throw std::out_of_range("position " + std::to_string(position) + " of an order of " + std::to_string(records) +
                            " records");
  }
  return order.at(position);
}

Numbers fill(const Order& order, std::uint64_t begin, std::size_t count) {
  const std::uint64_t records = order.parameters().records;
  if (begin > records || count > records - begin) {
    throw std::out_of_range(std::to_string(count) + " positions from " + std::to_string(begin) + " of an order of " +
                            std::to_string(records) + " records");
  }
  Numbers out(count);
  {
    nb::gil_scoped_release free;
    order.fill(begin, count, out.data());
  }
  return out;
}

data::ShareParameters share_of(std::uint64_t records, std::uint64_t base, std::uint64_t world, std::uint64_t rank,
                               std::uint64_t batch, std::uint64_t lanes, int tail, std::int64_t agreed_steps) {
  if (world == 0 || rank >= world || batch == 0 || lanes == 0 || tail < 0 || tail > 2) {
    throw std::invalid_argument("expected rank < world, a batch and lanes of at least 1, and tail 0 (drop), 1 (pad) " +
                                std::string("or 2 (short); found rank ") + std::to_string(rank) + ", world " +
                                std::to_string(world) + ", batch " + std::to_string(batch) + ", lanes " +
                                std::to_string(lanes) + ", tail " + std::to_string(tail));
  }
  const std::uint64_t agreed = agreed_steps < 0 ? data::kNotAgreed : static_cast<std::uint64_t>(agreed_steps);
  return {records, base, world, rank, batch, lanes, static_cast<data::Tail>(tail), agreed};
}

std::uint64_t steps(std::uint64_t records, std::uint64_t base, std::uint64_t world, std::uint64_t batch, int tail) {
  return data::steps(share_of(records, base, world, 0, batch, 1, tail, -1));
}

void check_step(const data::ShareParameters& share, std::uint64_t step) {
  if (step >= data::steps(share)) {
    throw std::out_of_range("step " + std::to_string(step) + " of " + std::to_string(data::steps(share)));
  }
}

std::pair<Numbers, std::size_t> rows_of(const Order& order, std::uint64_t step, std::uint64_t base, std::uint64_t world,
                                        std::uint64_t rank, std::uint64_t batch, int tail, std::int64_t agreed_steps) {
  const auto& parameters = order.parameters();
  const auto share = share_of(parameters.records, base, world, rank, batch, parameters.lanes, tail, agreed_steps);
  check_step(share, step);
  Numbers out(static_cast<std::size_t>(batch));
  const data::Rows rows = data::rows_of(share, order, step, out.data());
  out.resize(rows.rows);
  return {std::move(out), rows.valid};
}

// begin, padding, rows, valid
nb::tuple span_of(std::uint64_t records, std::uint64_t step, std::uint64_t base, std::uint64_t world,
                  std::uint64_t rank, std::uint64_t batch, int tail, std::int64_t agreed_steps) {
  const auto share = share_of(records, base, world, rank, batch, 1, tail, agreed_steps);
  check_step(share, step);
  const data::Span span = data::span_of(share, step);
  return nb::make_tuple(span.begin, span.padding, span.rows, span.valid);
}

Numbers network(const Order& order) {
  const auto& parameters = order.parameters();
  if (parameters.shuffle != data::Shuffle::full || !order.records().table().empty() || parameters.records == 0) {
    return {};
  }
  const data::Feistel& own = order.records().network().numbers();
  Numbers out{own.n, own.low_bits, own.low_mask, own.high_mask};
  for (const data::FeistelKey& key : own.keys) {
    out.insert(out.end(), {key.first, key.second});
  }
  return out;
}

nb::bytes table(const Order& order) {
  const auto& own = order.records().table();
  return nb::bytes(reinterpret_cast<const char*>(own.data()), own.size() * sizeof own[0]);
}

}  // namespace

void bind_order(nb::module_& module) {
  using namespace nb::literals;
  module.attr("ORDER_VERSION") = static_cast<unsigned>(data::kOrderVersion);
  nb::class_<Order>(module, "Order")
      .def(nb::new_(&make_order), "shuffle"_a, "seed"_a, "epoch"_a, "records"_a, "extent"_a = 1, "window"_a = 1,
           "lanes"_a = 1)
      .def("at", &at, "position"_a)
      .def("fill", &fill, "begin"_a, "count"_a)
      .def_prop_ro("records", [](const Order& order) { return order.parameters().records; })
      .def_prop_ro("table", &table)
      .def_prop_ro("network", &network);
  module.def("steps", &steps, "records"_a, "base"_a, "world"_a, "batch"_a, "tail"_a);
  module.def("rows_of", &rows_of, "order"_a, "step"_a, "base"_a, "world"_a, "rank"_a, "batch"_a, "tail"_a,
             "agreed_steps"_a = -1);
  module.def("span_of", &span_of, "records"_a, "step"_a, "base"_a, "world"_a, "rank"_a, "batch"_a, "tail"_a,
             "agreed_steps"_a = -1);
}

}  // namespace launcher::python
