#include "arguments.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace launcher::python {

data::Field field_of(const FieldTuple& tuple) {
  const auto& [name, kind, dtype, shape] = tuple;
  if (kind < 0 || kind > 2 || dtype < 0 || dtype >= collectives::kDTypes) {
    throw nb::value_error("there is no such kind or dtype of a field");
  }
  return {name, static_cast<data::Kind>(kind), static_cast<data::DType>(dtype), shape};
}

std::vector<data::Field> fields_of(const std::vector<FieldTuple>& tuples) {
  std::vector<data::Field> fields;
  std::transform(tuples.begin(), tuples.end(), std::back_inserter(fields), field_of);
  return fields;
}

FieldTuple tuple_of(const data::Field& field) {
  return {field.name, static_cast<int>(field.kind), static_cast<int>(field.dtype), field.shape};
}

nb::list described(const std::vector<data::Field>& fields) {
  nb::list out;
  for (const data::Field& field : fields) {
    nb::list shape;
    for (const std::uint64_t extent : field.shape) {
      shape.append(extent);
    }
    out.append(
        nb::make_tuple(field.name, static_cast<int>(field.kind), static_cast<int>(field.dtype), nb::tuple(shape)));
  }
  return out;
}

data::Dialect dialect_of(const std::string& name) {
  if (name == "auto") {
    return data::Dialect::automatic;
  }
  if (name == "dmlc" || name == "plain") {
    return name == "dmlc" ? data::Dialect::dmlc : data::Dialect::plain;
  }
  throw nb::value_error("dialect is auto, dmlc or plain");
}

std::shared_ptr<nb::object> hold(nb::object function) {
  return {new nb::object(std::move(function)), [](nb::object* object) {
            if (Py_IsInitialized() != 0) {
              nb::gil_scoped_acquire locked;
              delete object;
            }
          }};
}

}  // namespace launcher::python
