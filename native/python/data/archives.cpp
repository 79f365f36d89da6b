#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "decoded_source.h"
#include "files_source.h"
#include "jpeg.h"
#include "mds.h"
#include "module.h"
#include "paths.h"
#include "tar.h"

namespace launcher::python {
namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;
using Shape = std::vector<std::uint64_t>;

data::Field to_field(const std::string& name, int dtype, const std::optional<Shape>& shape) {
  if (dtype < 0 || dtype >= collectives::kDTypes) {
    throw nb::value_error("no such dtype");
  }
  return {name, shape ? data::Kind::fixed : data::Kind::ragged, static_cast<data::DType>(dtype),
          shape.value_or(Shape())};
}

std::shared_ptr<const data::Source> make_tar_source(const data::Index& index,
                                                    const std::vector<std::tuple<std::string, bool>>& fields,
                                                    bool exact) {
  std::vector<data::TarField> wanted;
  for (const auto& [name, integer] : fields) {
    wanted.push_back({name, integer});
  }
  return data::tar_source(index, std::move(wanted), exact);
}

// A column: name, dtype, shape (None: ragged), bytes (0: the sample says), whether its shape comes first, wanted.
using MdsColumn = std::tuple<std::string, int, std::optional<Shape>, std::uint64_t, bool, bool>;

std::shared_ptr<const data::Source> make_mds_source(const data::Index& index, const std::vector<MdsColumn>& columns) {
  std::vector<data::MdsColumn> all;
  for (const auto& [name, dtype, shape, bytes, shaped, wanted] : columns) {
    all.push_back(
        {to_field(name, dtype, shape), bytes, shaped ? data::MdsCoding::shaped : data::MdsCoding::plain, wanted});
  }
  return data::mds_source(index, std::move(all));
}

nb::object mds_header(const data::File& file) {
  std::string text;
  {
    const nb::gil_scoped_release released;
    text = data::mds_header(file);
  }
  return nb::bytes(text.data(), text.size());
}

std::shared_ptr<const data::Source> make_files_source(nb::handle root, nb::iterable files,
                                                      std::vector<std::int64_t> labels) {
  std::vector<data::Entry> entries;
  for (const nb::handle file : files) {
    const auto entry = nb::cast<nb::tuple>(file);
    entries.push_back({to_path(entry[0]), nb::cast<std::uint64_t>(entry[1]), nb::cast<std::int64_t>(entry[2])});
  }
  return data::files_source(to_path(root), entries, std::move(labels));
}

// A field: name, dtype, shape (None: ragged), offset in the row.
using DecodedField = std::tuple<std::string, int, std::optional<Shape>, std::uint64_t>;

std::shared_ptr<const data::Source> make_decoded_source(std::shared_ptr<const data::File> file, std::uint64_t records,
                                                        std::uint64_t stride, const std::vector<DecodedField>& fields,
                                                        nb::iterable origins, bool named) {
  data::Decoded decoded{std::move(file), records, stride, {}, {}, named};
  for (const auto& [name, dtype, shape, offset] : fields) {
    decoded.fields.push_back({to_field(name, dtype, shape), offset});
  }
  for (const nb::handle origin : origins) {
    const auto pair = nb::cast<nb::tuple>(origin);
    decoded.origins.emplace_back(to_path(pair[0]), nb::cast<std::uint64_t>(pair[1]));
  }
  return data::decoded_source(std::move(decoded));
}

std::vector<std::string> to_paths(nb::iterable paths) {
  std::vector<std::string> all;
  for (const nb::handle path : paths) {
    all.push_back(to_path(path));
  }
  return all;
}

std::shared_ptr<const data::Source> make_jpeg_source(std::shared_ptr<const data::Source> source,
                                                     const std::string& field, const std::string& name,
                                                     std::size_t height, std::size_t width, std::size_t channels,
                                                     bool crop, nb::iterable libraries) {
  std::string why;
  auto library = data::JpegLibrary::find(to_paths(libraries), why);
  if (!library) {
    throw std::runtime_error(why);
  }
  return data::jpeg_source(std::move(source), {field, name, height, width, channels, crop}, std::move(library));
}

// (name of the library, "") or ("", what was tried).
std::pair<std::string, std::string> jpeg_library(nb::iterable libraries) {
  std::string why;
  const auto library = data::JpegLibrary::find(to_paths(libraries), why);
  return library ? std::pair(library->name(), std::string()) : std::pair(std::string(), why);
}

}  // namespace

void bind_archives(nb::module_& module) {
  module.def("scan_tar", nb::overload_cast<const data::File&, bool>(&data::scan_tar), nb::arg("file"),
             nb::arg("skip") = false, Released());
  module.def("tar_extensions", &data::tar_extensions, nb::arg("index"), Released());
  module.def("tar_source", make_tar_source, nb::arg("index"), nb::arg("fields"), nb::arg("exact") = true);
  module.def("scan_mds", nb::overload_cast<const data::File&, bool>(&data::scan_mds), nb::arg("file"),
             nb::arg("skip") = false, Released());
  module.def("mds_header", mds_header, nb::arg("file"));
  module.def("mds_source", make_mds_source, nb::arg("index"), nb::arg("columns"));
  module.def("files_source", make_files_source, nb::arg("root"), nb::arg("files"),
             nb::arg("labels") = std::vector<std::int64_t>());
  module.def("decoded_source", make_decoded_source, nb::arg("file"), nb::arg("records"), nb::arg("stride"),
             nb::arg("fields"), nb::arg("origins"), nb::arg("named") = false);
  module.def("jpeg_library", jpeg_library, nb::arg("libraries") = nb::make_tuple());
  module.def("jpeg_source", make_jpeg_source, nb::arg("source"), nb::arg("field"), nb::arg("name"), nb::arg("height"),
             nb::arg("width"), nb::arg("channels") = 3, nb::arg("crop") = false,
             nb::arg("libraries") = nb::make_tuple());
}

}  // namespace launcher::python
