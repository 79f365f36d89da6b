#include "transform.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace launcher::data {
namespace {

// `rows` rows from one column's memory to another's; returns the first row that can not be changed, or `rows`.
using Run = std::function<std::size_t(const std::byte* from, std::byte* to, std::size_t rows)>;

template <typename T>
inline constexpr bool kBoolean = std::is_same_v<T, bool>;

// float16 and bfloat16 have no type of C++20.
template <typename Use>
auto with_type(DType dtype, const std::string& field, Use&& use) {
  switch (dtype) {
    case DType::float32:
      return use(float{});
    case DType::float64:
      return use(double{});
    case DType::int8:
      return use(std::int8_t{});
    case DType::uint8:
    case DType::boolean:
      return use(std::uint8_t{});
    case DType::int16:
      return use(std::int16_t{});
    case DType::int32:
      return use(std::int32_t{});
    case DType::int64:
      return use(std::int64_t{});
    case DType::uint16:
      return use(std::uint16_t{});
    case DType::uint32:
      return use(std::uint32_t{});
    case DType::uint64:
      return use(std::uint64_t{});
    default:
      throw std::invalid_argument("field '" + field + "': 16-bit floating point can not be changed here; change the " +
                                  "batch with a function of your own");
  }
}

template <typename From, typename To>
Run affine(std::vector<double> scale, std::vector<double> shift, std::size_t values) {
  // In float32 unless one side has more digits than that: then the steps between are as fine as the result.
  using Wide = std::conditional_t<std::is_same_v<To, double> || sizeof(From) == 8, double, float>;
  std::vector<Wide> factors(scale.begin(), scale.end()), terms(shift.begin(), shift.end());
  factors.resize(values, factors.front());
  terms.resize(values, terms.front());
  const bool uniform = scale.size() == 1 && shift.size() == 1;
  return [=, factors = std::move(factors), terms = std::move(terms)](const std::byte* from, std::byte* to,
                                                                     std::size_t rows) {
    const From* in = reinterpret_cast<const From*>(from);
    To* out = reinterpret_cast<To*>(to);
    if (uniform && values != 0) {
      const Wide factor = factors[0], term = terms[0];
      for (std::size_t i = 0; i < rows * values; ++i) {
        out[i] = static_cast<To>(static_cast<Wide>(in[i]) * factor + term);
      }
      return rows;
    }
    for (std::size_t row = 0; row < rows; ++row, in += values, out += values) {
      for (std::size_t i = 0; i < values; ++i) {
        out[i] = static_cast<To>(static_cast<Wide>(in[i]) * factors[i] + terms[i]);
      }
    }
    return rows;
  };
}

template <typename From, typename To>
Run one_hot(std::uint64_t classes, std::size_t values) {
  return [=](const std::byte* from, std::byte* to, std::size_t rows) {
    const From* in = reinterpret_cast<const From*>(from);
    To* out = reinterpret_cast<To*>(to);
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t i = 0; i < values; ++i, ++in, out += classes) {
        const auto place = static_cast<std::uint64_t>(*in);  // of a negative one: larger than any class
        if (place >= classes) {
          return row;
        }
        std::fill_n(out, classes, To{0});
        out[place] = To{1};
      }
    }
    return rows;
  };
}

template <typename From, typename To>
bool fits(From value) noexcept {
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    // Both bounds are powers of two, which are exact; what is between them has its whole part in range.
    const From above = std::ldexp(From{1}, std::numeric_limits<To>::digits);
    const From below = std::is_signed_v<To> ? -above : From{0};
    const From whole = std::trunc(value);
    return whole >= below && whole < above;  // false for NaN
  } else {
    return true;
  }
}

template <typename From, typename To>
Run cast(bool to_boolean, std::size_t values) {
  return [=](const std::byte* from, std::byte* to, std::size_t rows) {
    const From* in = reinterpret_cast<const From*>(from);
    To* out = reinterpret_cast<To*>(to);
    for (std::size_t i = 0; i < rows * values; ++i) {
      if (to_boolean) {
        out[i] = static_cast<To>(in[i] != From{0} ? 1 : 0);
      } else if (fits<From, To>(in[i])) {
        out[i] = static_cast<To>(in[i]);
      } else {
        return i / values;
      }
    }
    return rows;
  };
}

Run make_run(const Change& change, const Field& field) {
  const auto values = static_cast<std::size_t>(field.values());
  return with_type(field.dtype, field.name, [&](auto from) {
    return with_type(change.dtype, field.name, [&](auto to) -> Run {
      using From = decltype(from);
      using To = decltype(to);
      switch (change.kind) {
        case Change::Kind::affine:
          if constexpr (std::is_floating_point_v<To>) {
            return affine<From, To>(change.scale, change.shift, values);
          }
          break;
        case Change::Kind::one_hot:
          if constexpr (std::is_integral_v<From>) {
            return one_hot<From, To>(change.classes, values);
          }
          break;
        case Change::Kind::cast:
          return cast<From, To>(change.dtype == DType::boolean, values);
      }
      throw std::invalid_argument("field '" + field.name + "': only integers have a one-hot form, and only floating " +
                                  "point holds a normalised value");
    });
  });
}

Field changed(const Field& field, const Change& change) {
  Field out = field;
  out.dtype = change.dtype;
  if (change.kind == Change::Kind::one_hot) {
    out.shape.push_back(change.classes);
  }
  return out;
}

void check(const Change& change, const Field& field) {
  if (field.kind != Kind::fixed) {
    throw std::invalid_argument("field '" + field.name + "' is ragged or sparse; only fields of a fixed shape change");
  }
  const auto fitting = [&field](const std::vector<double>& numbers) {
    return numbers.size() == 1 || numbers.size() == field.values();
  };
  if (change.kind == Change::Kind::affine && !(fitting(change.scale) && fitting(change.shift))) {
    throw std::invalid_argument("field '" + field.name + "' has " + std::to_string(field.values()) +
                                " values; expected as many means and deviations, or one of each");
  }
  if (change.kind == Change::Kind::one_hot && change.classes == 0) {
    throw std::invalid_argument("field '" + field.name + "': 0 classes; expected 1 at least");
  }
}

class ChangedSource final : public Source {
 public:
  ChangedSource(std::shared_ptr<const Source> source, const std::vector<Change>& changes)
      : source_(std::move(source)), fields_(source_->fields()), of_field_(fields_.size(), kNone) {
    for (const Change& change : changes) {
      const auto found = std::find_if(source_->fields().begin(), source_->fields().end(),
                                      [&change](const Field& field) { return field.name == change.field; });
      if (found == source_->fields().end()) {
        throw std::invalid_argument("no field '" + change.field + "' to change");
      }
      const auto number = static_cast<std::size_t>(found - source_->fields().begin());
      if (of_field_[number] != kNone) {
        throw std::invalid_argument("field '" + change.field + "' is to be changed twice");
      }
      check(change, *found);
      fields_[number] = changed(*found, change);
      of_field_[number] = steps_.size();
      steps_.push_back({make_run(change, *found), found->values() * size_of(found->dtype),
                        fields_[number].values() * size_of(fields_[number].dtype)});
    }
  }

  std::uint64_t records() const noexcept override { return source_->records(); }
  std::uint64_t bytes() const noexcept override { return source_->bytes(); }
  const std::vector<Field>& fields() const noexcept override { return fields_; }
  std::span<const std::shared_ptr<const File>> files() const noexcept override { return source_->files(); }
  void expect(std::span<const std::uint64_t> records) const noexcept override { source_->expect(records); }
  std::unique_ptr<Scratch> make_scratch() const override {
    auto state = std::make_unique<State>();
    state->inner = source_->make_scratch();
    return state;
  }
  DataError describe(Problem problem, std::uint64_t record, const std::string& text) const override {
    return source_->describe(problem, record, text);
  }

  void fetch(std::span<const std::uint64_t> records, Batch& batch, Scratch& scratch) const override {
    State& state = static_cast<State&>(scratch);
    if (state.batch == nullptr || state.batch->capacity < batch.capacity) {
      state.batch = std::make_unique<Batch>(source_->fields(), batch.capacity);
    }
    const std::size_t begin = batch.rows;
    state.batch->rows = begin;
    std::exception_ptr failed;
    exchange(batch, *state.batch);  // what is not changed goes straight to where it belongs
    try {
      source_->fetch(records, *state.batch, *state.inner);
    } catch (const DataError&) {
      failed = std::current_exception();
    } catch (...) {
      exchange(batch, *state.batch);
      throw;
    }
    exchange(batch, *state.batch);
    const std::size_t rows = state.batch->rows - begin;
    std::size_t done = rows;
    for (std::size_t column = 0; column < fields_.size(); ++column) {
      if (of_field_[column] != kNone) {
        const Step& step = steps_[of_field_[column]];
        done = std::min(done, step.run(state.batch->columns[column].values.data() + begin * step.bytes_before,
                                       batch.columns[column].values.data() + begin * step.bytes_after, done));
      }
    }
    batch.rows = begin + done;
    if (done != rows) {
      throw source_->describe(Problem::mismatch, records[done],
                              "a value is out of the range that its change takes (one_hot: a class from 0 on; cast: "
                              "what the integer type holds)");
    }
    if (failed) {
      std::rethrow_exception(failed);
    }
  }

 private:
  static constexpr std::size_t kNone = ~std::size_t{0};
  struct Step {
    Run run;
    std::size_t bytes_before, bytes_after;  // of a record
  };
  struct State final : Scratch {
    std::unique_ptr<Scratch> inner;
    std::unique_ptr<Batch> batch;  // columns as they are before the change
  };

  void exchange(Batch& one, Batch& other) const noexcept {
    for (std::size_t column = 0; column < fields_.size(); ++column) {
      if (of_field_[column] == kNone) {
        std::swap(one.columns[column], other.columns[column]);
      }
    }
  }

  std::shared_ptr<const Source> source_;
  std::vector<Field> fields_;
  std::vector<std::size_t> of_field_;  // the step of each field
  std::vector<Step> steps_;
};

}  // namespace

std::shared_ptr<const Source> changed_source(std::shared_ptr<const Source> source, std::vector<Change> changes) {
  return std::make_shared<ChangedSource>(std::move(source), changes);
}

}  // namespace launcher::data
