// What several parts take from Python, or give to it, in the same form.
#ifndef LAUNCHER_PYTHON_DATA_ARGUMENTS_H
#define LAUNCHER_PYTHON_DATA_ARGUMENTS_H

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "module.h"
#include "recordio.h"
#include "source.h"

namespace launcher::python {

using FieldTuple = std::tuple<std::string, int, int, std::vector<std::uint64_t>>;  // name, kind, dtype, shape

data::Field field_of(const FieldTuple& tuple);  // throws ValueError: there is no such kind or dtype
std::vector<data::Field> fields_of(const std::vector<FieldTuple>& tuples);
FieldTuple tuple_of(const data::Field& field);
nb::list described(const std::vector<data::Field>& fields);  // tuples, their shapes tuples as well

data::Dialect dialect_of(const std::string& name);  // throws ValueError

// A function of Python's that C++ threads call. Copies of the pointer are made and dropped without the GIL.
std::shared_ptr<nb::object> hold(nb::object function);

}  // namespace launcher::python

#endif
