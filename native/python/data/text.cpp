#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "csv.h"
#include "json.h"
#include "libsvm.h"
#include "lines.h"
#include "module.h"

namespace launcher::python {
namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;
using SourcePointer = std::shared_ptr<const data::Source>;
using Columns = std::tuple<FieldTuple, std::size_t, std::size_t>;  // and the first column, and how many

// A character as an option, and whether it makes sense: not one that numbers or lines have. `none`: the empty text is
// no character.
char character(const std::string& text, const char* what, bool none) {
  constexpr std::string_view kTaken = "+-.0123456789eE\r\n";
  if (text.empty() && none) {
    return '\0';
  }
  if (text.size() != 1 || text[0] == '\0' || kTaken.find(text[0]) != std::string_view::npos) {
    throw nb::value_error((std::string(what) + " is one character, which no number and no line end has").c_str());
  }
  return text[0];
}

data::CsvRules csv_rules(const std::string& delimiter, const std::string& quote) {
  const data::CsvRules rules{character(delimiter, "delimiter", false), character(quote, "quote", true)};
  if (rules.delimiter == rules.quote) {
    throw nb::value_error("delimiter and quote are the same character");
  }
  return rules;
}

data::FileIndex scan_lines(const data::File& file, bool keep_blank, bool skip) {
  return data::scan_lines(file, {.rules = {.keep_blank = keep_blank}, .skip = skip});
}

data::FileIndex scan_csv(const data::File& file, const std::string& delimiter, const std::string& quote, bool header,
                         bool skip) {
  const data::CsvRules rules = csv_rules(delimiter, quote);
  return data::scan_lines(
      file, {.rules = {.quote = rules.quote, .delimiter = rules.delimiter}, .header = header, .skip = skip});
}

// Text is no str where it is no UTF-8: as os.fsdecode() would have it.
std::vector<nb::object> to_texts(const std::vector<std::string>& all) {
  std::vector<nb::object> texts;
  for (const std::string& one : all) {
    PyObject* text = PyUnicode_DecodeUTF8(one.data(), static_cast<Py_ssize_t>(one.size()), "surrogateescape");
    if (text == nullptr) {
      throw nb::python_error();
    }
    texts.push_back(nb::steal(text));
  }
  return texts;
}

std::optional<std::string> first_line(const data::Index& index) {
  const nb::gil_scoped_release released;
  return data::first_record(index);
}

std::optional<std::vector<nb::object>> csv_first(const data::Index& index, const std::string& delimiter,
                                                 const std::string& quote) {
  const auto line = first_line(index);
  if (!line) {
    return std::nullopt;
  }
  return to_texts(data::csv_split(*line, csv_rules(delimiter, quote)));
}

std::vector<nb::object> csv_names(const data::Index& index, const std::string& delimiter, const std::string& quote) {
  return to_texts(data::csv_split(data::csv_header(index), csv_rules(delimiter, quote)));
}

SourcePointer csv_source(const data::Index& index, std::size_t columns, const std::vector<Columns>& fields,
                         const std::string& delimiter, const std::string& quote) {
  std::vector<data::CsvField> parts;
  for (const auto& [field, first, count] : fields) {
    parts.push_back({field_of(field), first, count});
  }
  return data::csv_source(index, data::CsvCodec(csv_rules(delimiter, quote), columns, std::move(parts)));
}

std::tuple<std::uint64_t, std::uint64_t, bool, bool> libsvm_facts(const data::Index& index) {
  const data::LibsvmFacts facts = data::libsvm_facts(index);
  return {facts.smallest, facts.largest, facts.any, facts.queries};
}

SourcePointer libsvm_source(const data::Index& index, std::uint64_t features, bool zero_based, int dtype,
                            bool queries) {
  return data::libsvm_source(index, {features, zero_based, field_of({"", 0, dtype, {}}).dtype, queries});
}

std::vector<FieldTuple> json_fields(const data::Index& index, const std::vector<std::string>& names) {
  std::vector<FieldTuple> tuples;
  const auto line = first_line(index);
  if (!line) {
    return tuples;
  }
  const data::Place place = index.place(0);
  try {
    for (const data::Field& field : data::json_fields(*line, names)) {
      tuples.push_back(tuple_of(field));
    }
  } catch (const data::JsonError& error) {
    throw data::DataError(error.malformed() ? data::Problem::malformed : data::Problem::mismatch,
                          index.files()[place.file]->path(), place.offset + error.offset(), place.number, error.what());
  }
  return tuples;
}

SourcePointer json_source(const data::Index& index, const std::vector<FieldTuple>& fields) {
  return data::json_source(index, fields_of(fields));
}

}  // namespace

void bind_text(nb::module_& module) {
  module.def("scan_lines", scan_lines, nb::arg("file"), nb::arg("keep_blank") = true, nb::arg("skip") = false,
             Released());
  module.def("lines_source", data::lines_source, nb::arg("index"));
  module.def("scan_csv", scan_csv, nb::arg("file"), nb::arg("delimiter") = ",", nb::arg("quote") = "\"",
             nb::arg("header") = false, nb::arg("skip") = false, Released());
  module.def("csv_first", csv_first, nb::arg("index"), nb::arg("delimiter") = ",", nb::arg("quote") = "\"");
  module.def("csv_names", csv_names, nb::arg("index"), nb::arg("delimiter") = ",", nb::arg("quote") = "\"");
  module.def("csv_source", csv_source, nb::arg("index"), nb::arg("columns"), nb::arg("fields"),
             nb::arg("delimiter") = ",", nb::arg("quote") = "\"");
  module.def("scan_libsvm", data::scan_libsvm, nb::arg("file"), nb::arg("skip") = false, Released());
  module.def("libsvm_facts", libsvm_facts, nb::arg("index"));
  module.def("libsvm_source", libsvm_source, nb::arg("index"), nb::arg("features"), nb::arg("zero_based") = false,
             nb::arg("dtype") = 0, nb::arg("queries") = false);
  module.def("json_fields", json_fields, nb::arg("index"), nb::arg("names") = std::vector<std::string>());
  module.def("json_source", json_source, nb::arg("index"), nb::arg("fields"));
}

}  // namespace launcher::python
