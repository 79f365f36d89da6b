#include "share.h"

#include <algorithm>
#include <limits>

namespace launcher::data {
namespace {

// Rows of a step of all ranks. Saturates: no set of records has as many.
std::uint64_t rows_of_step(const ShareParameters& parameters) noexcept {
  std::uint64_t rows = 0;
  const bool over = __builtin_mul_overflow(parameters.world, parameters.batch, &rows);
  return over ? std::numeric_limits<std::uint64_t>::max() : rows;
}

// The positions begin .. begin + count, sorted by lane, and within a lane as they come.
class ByLane {
 public:
  ByLane(std::uint64_t begin, std::uint64_t count, std::uint64_t lanes) noexcept
      : begin_(begin), lanes_(lanes), start_(begin % lanes), each_(count / lanes), longer_(count % lanes) {}

  // How many of them are in the lanes before `lane`.
  std::uint64_t before(std::uint64_t lane) const noexcept {
    // The lanes start_ .. start_ + longer_, going on from 0 at the last one, have one more than the others.
    const auto within = [lane](std::uint64_t from, std::uint64_t to) {
      return lane > from ? std::min(lane, to) - from : 0;
    };
    const std::uint64_t end = start_ + longer_;
    const std::uint64_t wrapped = end > lanes_ ? end - lanes_ : 0;
    return lane * each_ + within(start_, end - wrapped) + within(0, wrapped);
  }

  // The lane that has the row; row < count.
  std::uint64_t lane_of(std::uint64_t row) const noexcept {
    std::uint64_t low = 0, high = lanes_ - 1;
    while (low < high) {
      const std::uint64_t middle = low + (high - low + 1) / 2;
      if (before(middle) <= row) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  std::uint64_t first_position(std::uint64_t lane) const noexcept {
    return begin_ + (lane >= start_ ? lane - start_ : lane + lanes_ - start_);
  }

 private:
  std::uint64_t begin_, lanes_, start_, each_, longer_;
};

void fill_by_lane(const Order& order, const ByLane& sorted, std::uint64_t lanes, std::uint64_t row, std::size_t count,
                  std::uint64_t* out) noexcept {
  for (std::uint64_t lane = sorted.lane_of(row); count > 0; ++lane) {
    const std::uint64_t first = sorted.before(lane);
    const auto some = static_cast<std::size_t>(std::min<std::uint64_t>(count, sorted.before(lane + 1) - row));
    order.fill_lane(sorted.first_position(lane) + (row - first) * lanes, some, out);
    row += some;
    out += some;
    count -= some;
  }
}

struct Step {
  std::uint64_t begin, count;  // positions of all ranks
};

Step step_of(const ShareParameters& parameters, std::uint64_t step) noexcept {
  const std::uint64_t records = parameters.records, each = rows_of_step(parameters);
  std::uint64_t begin = 0;  // `records` when there are none left for it
  if (__builtin_mul_overflow(step, each, &begin) || __builtin_add_overflow(begin, parameters.base, &begin) ||
      begin > records) {
    begin = records;
  }
  return {begin, std::min(each, records - begin)};
}

}  // namespace

std::uint64_t steps(const ShareParameters& parameters) noexcept {
  if (parameters.agreed_steps != kNotAgreed) {
    return parameters.agreed_steps;
  }
  const std::uint64_t each = rows_of_step(parameters);
  if (parameters.base >= parameters.records || each == 0) {
    return 0;
  }
  const std::uint64_t left = parameters.records - parameters.base;
  return left / each + (parameters.tail != Tail::drop && left % each != 0);
}

Span span_of(const ShareParameters& parameters, std::uint64_t step) noexcept {
  const auto [begin, count] = step_of(parameters, step);
  const std::uint64_t batch = parameters.batch, row = parameters.rank * batch;
  const auto valid = static_cast<std::size_t>(row < count ? std::min(batch, count - row) : 0);
  if (parameters.tail != Tail::pad || parameters.records == 0) {
    return {begin + row, 0, valid, valid};
  }
  // Row r of the step that has no record of its own takes that of position r - count, again and again if there are few.
  // (A full batch has none; what is said for it is not used.)
  const std::uint64_t padding = valid == batch ? 0 : (row + valid - count) % parameters.records;
  return {begin + row, padding, static_cast<std::size_t>(batch), valid};
}

Rows rows_of(const ShareParameters& parameters, const Order& order, std::uint64_t step, std::uint64_t* out) noexcept {
  const Span span = span_of(parameters, step);
  if (span.valid > 0) {
    if (parameters.lanes == 1) {
      order.fill(span.begin, span.valid, out);
    } else {
      const auto [begin, count] = step_of(parameters, step);
      fill_by_lane(order, ByLane(begin, count, parameters.lanes), parameters.lanes, parameters.rank * parameters.batch,
                   span.valid, out);
    }
  }
  std::uint64_t position = span.padding;
  for (std::size_t filled = span.valid; filled < span.rows; position = 0) {
    const auto some = static_cast<std::size_t>(std::min(span.rows - filled, parameters.records - position));
    order.fill(position, some, out + filled);
    filled += some;
  }
  return {span.rows, span.valid};
}

}  // namespace launcher::data
