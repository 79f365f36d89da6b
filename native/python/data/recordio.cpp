#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "encode.h"
#include "example_codec.h"
#include "indexed_source.h"
#include "module.h"
#include "record_proto_codec.h"
#include "recordio_codec.h"
#include "tfrecord.h"

namespace launcher::python {
namespace {

using SourcePointer = std::shared_ptr<const data::Source>;
using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
// The field, the values, and of ragged and sparse ones offsets (int64), of sparse ones keys (uint64).
using ColumnTuple = std::tuple<FieldTuple, Array, std::optional<Array>, std::optional<Array>>;

std::vector<data::TensorField> declared(data::MessageForm form, const std::vector<FieldTuple>& tuples) {
  return data::declare_fields(form, fields_of(tuples));
}

SourcePointer recordio_source(const data::Index& index, const std::string& dialect, bool image_header) {
  const data::Dialect wanted = dialect_of(dialect);
  const nb::gil_scoped_release released;
  data::Dialects dialects(wanted, index.files().size());
  if (image_header) {
    const std::uint32_t labels = data::image_labels(index, wanted);
    return std::make_shared<data::IndexedSource<data::RecordCodec>>(index, data::RecordCodec(dialects, labels));
  }
  return std::make_shared<data::IndexedSource<data::RecordCodec>>(index, data::RecordCodec(dialects));
}

std::vector<FieldTuple> tuples_of(const data::RecordSchema& schema) {
  std::vector<FieldTuple> tuples;
  std::transform(schema.fields.begin(), schema.fields.end(), std::back_inserter(tuples),
                 [](const data::TensorField& field) { return tuple_of(field.field); });
  return tuples;
}

std::vector<FieldTuple> record_proto_schema(const data::Index& index, const std::string& dialect) {
  const data::Dialect wanted = dialect_of(dialect);
  const nb::gil_scoped_release released;
  return tuples_of(data::infer_schema(index, wanted));
}

std::vector<FieldTuple> example_schema(const data::Index& index) {
  return tuples_of(data::infer_example_schema(index));
}

// The fields of `schema` by their names; all of them where none are named.
std::vector<std::size_t> positions(const std::vector<data::TensorField>& schema,
                                   const std::optional<std::vector<std::string>>& names) {
  std::vector<std::size_t> found;
  if (!names) {
    for (std::size_t i = 0; i < schema.size(); ++i) {
      found.push_back(i);
    }
    return found;
  }
  for (const std::string& name : *names) {
    const auto at = std::find_if(schema.begin(), schema.end(),
                                 [&](const data::TensorField& field) { return field.field.name == name; });
    if (at == schema.end()) {
      throw nb::value_error(("there is no field '" + name + "'").c_str());
    }
    found.push_back(static_cast<std::size_t>(at - schema.begin()));
  }
  return found;
}

using Schema = std::optional<std::vector<FieldTuple>>;
using Names = std::optional<std::vector<std::string>>;

SourcePointer record_proto_source(const data::Index& index, const std::string& dialect, const Schema& fields,
                                  const Names& names) {
  constexpr auto form = data::MessageForm::record;
  const data::Dialect wanted = dialect_of(dialect);
  data::RecordSchema schema;
  if (fields) {
    schema = {form, declared(form, *fields), false};
  } else {
    const nb::gil_scoped_release released;
    schema = data::infer_schema(index, wanted);
  }
  const std::vector<std::size_t> columns = positions(schema.fields, names);
  data::RecordProtoCodec codec(std::move(schema), columns, data::Dialects(wanted, index.files().size()));
  return std::make_shared<data::IndexedSource<data::RecordProtoCodec>>(index, std::move(codec));
}

SourcePointer example_source(const data::Index& index, bool check_sums, const Schema& fields, const Names& names) {
  constexpr auto form = data::MessageForm::example;
  data::RecordSchema schema;
  if (fields) {
    schema = {form, declared(form, *fields), false};
  } else {
    const nb::gil_scoped_release released;
    schema = data::infer_example_schema(index);
  }
  const std::vector<std::size_t> columns = positions(schema.fields, names);
  data::ExampleCodec codec(std::move(schema), columns, check_sums);
  return std::make_shared<data::IndexedSource<data::ExampleCodec>>(index, std::move(codec));
}

std::span<const std::byte> view_of(const nb::bytes& bytes) {
  return std::as_bytes(std::span(bytes.c_str(), bytes.size()));
}

nb::bytes to_bytes(const std::string& text) { return nb::bytes(text.data(), text.size()); }

// One message: its fields, with values as bytes and keys as numbers.
nb::list decode_message(data::MessageForm form, const nb::bytes& message, const Schema& fields) {
  const std::string file = "message";
  const auto payload = view_of(message);
  const data::RecordProtoCodec::Origin origin{file, 0, 0, 0};
  data::RecordSchema schema =
      fields ? data::RecordSchema{form, declared(form, *fields), false} : data::infer_schema(form, payload, origin);
  const std::vector<data::TensorField> all = schema.fields;
  const data::RecordProtoCodec codec(std::move(schema), positions(all, std::nullopt),
                                     data::Dialects(data::Dialect::plain, 0));
  data::Batch batch(codec.fields(), 1);
  data::RecordProtoCodec::State state;
  codec.decode_payload(payload, origin, 0, batch, state);
  nb::list result;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const data::Column& column = batch.columns[i];
    const bool fixed = all[i].field.kind == data::Kind::fixed;
    const auto count = fixed ? all[i].values : static_cast<std::uint64_t>(column.offsets[1]);
    const auto* keys = reinterpret_cast<const std::uint64_t*>(column.keys.data());
    const std::vector<std::uint64_t> numbers(keys, keys + (keys == nullptr ? 0 : count));
    const nb::bytes values(column.values.data(), count * data::size_of(all[i].field.dtype));
    result.append(nb::make_tuple(tuple_of(all[i].field), values, numbers));
  }
  return result;
}

std::size_t rows_of(const data::EncodedColumn& column, const Array& values, const std::optional<Array>& offsets,
                    const std::optional<Array>& keys) {
  const data::Field& field = column.field.field;
  const std::string what = "field '" + field.name + "': ";
  if (values.itemsize() != data::size_of(field.dtype)) {
    throw nb::value_error((what + "values of another size than its dtype's").c_str());
  }
  if (field.kind == data::Kind::fixed) {
    if (values.ndim() == 0 || values.shape(0) * column.field.values != values.size()) {
      throw nb::value_error((what + "not as many values as rows and shape need").c_str());
    }
    return values.shape(0);
  }
  if (!offsets || offsets->dtype() != nb::dtype<std::int64_t>() || offsets->size() == 0) {
    throw nb::value_error((what + "int64 offsets are needed").c_str());
  }
  if (field.kind == data::Kind::sparse &&
      (!keys || keys->dtype() != nb::dtype<std::uint64_t>() || keys->size() != values.size())) {
    throw nb::value_error((what + "a uint64 key for each value is needed").c_str());
  }
  const auto* at = column.offsets;
  const std::size_t rows = offsets->size() - 1;
  if (at[0] != 0 || !std::is_sorted(at, at + rows + 1) || static_cast<std::uint64_t>(at[rows]) != values.size()) {
    throw nb::value_error((what + "offsets must grow from 0 to the number of values").c_str());
  }
  return rows;
}

nb::bytes encode_record_proto(const std::vector<ColumnTuple>& tuples, std::size_t begin, std::size_t end, bool escape) {
  std::vector<FieldTuple> fields;
  std::transform(tuples.begin(), tuples.end(), std::back_inserter(fields),
                 [](const ColumnTuple& tuple) { return std::get<0>(tuple); });
  const std::vector<data::TensorField> schema = declared(data::MessageForm::record, fields);
  std::vector<data::EncodedColumn> columns;
  for (std::size_t i = 0; i < tuples.size(); ++i) {
    const auto& [field, values, offsets, keys] = tuples[i];
    data::EncodedColumn& column = columns.emplace_back();
    column.field = schema[i];
    column.values = static_cast<const std::byte*>(values.data());
    column.offsets = offsets ? static_cast<const std::int64_t*>(offsets->data()) : nullptr;
    column.keys = keys ? static_cast<const std::uint64_t*>(keys->data()) : nullptr;
    if (begin > end || end > rows_of(column, values, offsets, keys)) {
      throw nb::value_error(("field '" + schema[i].field.name + "' has fewer rows than are to be written").c_str());
    }
  }
  std::string out;
  {
    const nb::gil_scoped_release released;
    data::append_records(out, columns, begin, end, escape);
  }
  return to_bytes(out);
}

}  // namespace

void bind_recordio(nb::module_& module) {
  module.def(
      "scan_recordio",
      [](const data::File& file, const std::string& dialect, bool skip) {
        const data::Dialect wanted = dialect_of(dialect);
        const nb::gil_scoped_release released;
        return data::scan_recordio(file, wanted, skip);
      },
      nb::arg("file"), nb::arg("dialect") = "auto", nb::arg("skip") = false);
  module.def("recordio_source", recordio_source, nb::arg("index"), nb::arg("dialect") = "auto",
             nb::arg("image_header") = false);
  module.def("record_proto_schema", record_proto_schema, nb::arg("index"), nb::arg("dialect") = "auto");
  module.def("record_proto_source", record_proto_source, nb::arg("index"), nb::arg("dialect") = "auto",
             nb::arg("schema") = nb::none(), nb::arg("fields") = nb::none());
  module.def(
      "decode_record_proto",
      [](const nb::bytes& message, const Schema& schema) {
        return decode_message(data::MessageForm::record, message, schema);
      },
      nb::arg("message"), nb::arg("schema") = nb::none());
  module.def("example_schema", example_schema, nb::call_guard<nb::gil_scoped_release>(), nb::arg("index"));
  module.def("example_source", example_source, nb::arg("index"), nb::arg("check_sums") = true,
             nb::arg("schema") = nb::none(), nb::arg("fields") = nb::none());
  module.def(
      "decode_example",
      [](const nb::bytes& message, const Schema& schema) {
        return decode_message(data::MessageForm::example, message, schema);
      },
      nb::arg("message"), nb::arg("schema") = nb::none());
  module.def("scan_tfrecord", data::scan_tfrecord, nb::call_guard<nb::gil_scoped_release>(), nb::arg("file"),
             nb::arg("skip") = false);
  module.def(
      "tfrecord_source",
      [](const data::Index& index, bool check_sums) -> SourcePointer {
        return std::make_shared<data::IndexedSource<data::TfRecordCodec>>(index, data::TfRecordCodec(check_sums));
      },
      nb::arg("index"), nb::arg("check_sums") = true);

  module.def(
      "encode_recordio",
      [](const nb::bytes& payload, bool escape) {
        std::string out;
        data::append_recordio(out, view_of(payload), escape);
        return to_bytes(out);
      },
      nb::arg("payload"), nb::arg("escape") = true);
  module.def(
      "encode_tfrecord",
      [](const nb::bytes& payload) {
        std::string out;
        data::append_tfrecord(out, view_of(payload));
        return to_bytes(out);
      },
      nb::arg("data"));
  module.def("encode_record_proto", encode_record_proto, nb::arg("columns"), nb::arg("begin"), nb::arg("end"),
             nb::arg("escape") = false);
}

}  // namespace launcher::python
