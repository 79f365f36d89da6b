#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "catalogue.h"
#include "checking.h"
#include "extents.h"
#include "file.h"
#include "index.h"
#include "module.h"
#include "paths.h"
#include "sidecar.h"

namespace launcher::python {
namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;

// The files, and how many symbolic links were left out.
std::pair<nb::list, std::uint64_t> list_with_links(nb::handle root, bool hidden, bool links) {
  const std::string path = to_path(root);
  std::vector<data::Entry> entries;
  std::uint64_t left_out = 0;
  {
    const nb::gil_scoped_release released;
    entries = data::list_files(path, {hidden, links}, &left_out);
  }
  nb::list result;
  for (const data::Entry& entry : entries) {
    result.append(nb::make_tuple(from_path(entry.path), entry.size, entry.modified_ns));
  }
  return {std::move(result), left_out};
}

nb::list list_files(nb::handle root, bool hidden, bool links) { return list_with_links(root, hidden, links).first; }

std::shared_ptr<data::File> open_file(nb::handle file, const std::string& access) {
  data::Access how = data::Access::automatic;
  if (access == "mapped") {
    how = data::Access::mapped;
  } else if (access == "read") {
    how = data::Access::read;
  } else if (access != "automatic") {
    throw nb::value_error("access is automatic, mapped or read");
  }
  std::string path = to_path(file);
  const nb::gil_scoped_release released;
  return std::make_shared<data::File>(std::move(path), how);
}

nb::bytes read_bytes(const data::File& file, std::uint64_t offset, std::size_t bytes) {
  std::vector<std::byte> memory(file.mapped() ? 0 : bytes);
  std::vector<std::byte> copy;
  {
    const nb::gil_scoped_release released;
    const auto view = file.view(offset, bytes, memory.data());
    copy.assign(view.begin(), view.end());
    if (data::file_faults() != 0) {
      file.check_faults(offset, bytes);
    }
  }
  return nb::bytes(copy.data(), copy.size());
}

std::vector<data::Entry> entries_of(const nb::list& files) {
  std::vector<data::Entry> entries;
  entries.reserve(files.size());
  for (const nb::handle file : files) {
    entries.push_back({to_path(file[0]), nb::cast<std::uint64_t>(file[1]), nb::cast<std::int64_t>(file[2])});
  }
  return entries;
}

void save_index(nb::handle file, const std::string& key, const nb::list& files,
                const std::vector<std::shared_ptr<const data::FileIndex>>& parts) {
  const std::string path = to_path(file);
  const std::vector<data::Entry> entries = entries_of(files);
  const nb::gil_scoped_release released;
  data::save_index(path, key, entries, parts);
}

std::vector<std::optional<data::FileIndex>> load_index(nb::handle file, const std::string& key, const nb::list& files,
                                                       bool any_time) {
  const std::string path = to_path(file);
  const std::vector<data::Entry> entries = entries_of(files);
  const nb::gil_scoped_release released;
  return data::load_index(path, key, entries, any_time);
}

nb::list damage_of(const data::FileIndex& index) {
  nb::list result;
  for (const data::Damage& damage : index.damage()) {
    result.append(nb::make_tuple(damage.offset, damage.bytes, damage.text));
  }
  return result;
}

// The number of records that can not be read, and what is wrong with the first ones: (text, problem, file, offset,
// record), -1 where a number is not known.
nb::tuple check_records(const data::Source& source, std::uint64_t begin, std::uint64_t end, std::size_t most) {
  data::Checked checked;
  {
    const nb::gil_scoped_release released;
    checked = data::check_records(source, begin, std::min(end, source.records()), most);
  }
  const auto number = [](std::uint64_t value) {
    return value == data::kNowhere ? std::int64_t{-1} : static_cast<std::int64_t>(value);
  };
  nb::list errors;
  for (const data::DataError& error : checked.errors) {
    errors.append(nb::make_tuple(from_path(error.what()), static_cast<int>(error.problem()), from_path(error.file()),
                                 number(error.offset()), number(error.record())));
  }
  return nb::make_tuple(checked.bad, errors);
}

data::FileIndex file_index(const std::vector<std::pair<std::uint64_t, std::uint64_t>>& records) {
  data::FileIndex index;
  for (const auto& [offset, bytes] : records) {
    index.add(offset, bytes);
  }
  return index;
}

}  // namespace

void bind_files(nb::module_& module) {
  module.def("list_files", list_files, nb::arg("root"), nb::arg("hidden") = false, nb::arg("links") = false);
  module.def("list_with_links", list_with_links, nb::arg("root"), nb::arg("hidden") = false, nb::arg("links") = false);
  module.def(
      "served_by_fuse",
      [](nb::handle path) {
        const std::string place = to_path(path);
        const nb::gil_scoped_release released;
        return data::served_by_fuse(place);
      },
      nb::arg("path"));
  module.def("file_faults", data::file_faults);
  module.def("reserve_extents", [](std::uint64_t bytes) { data::extents().reserve(bytes); }, nb::arg("bytes"));

  module.def("check_records", check_records, nb::arg("source"), nb::arg("begin"), nb::arg("end"), nb::arg("most"));

  nb::class_<data::File>(module, "File")
      .def(nb::new_(&open_file), nb::arg("path"), nb::arg("access") = "automatic")
      .def_prop_ro("path", [](const data::File& file) { return from_path(file.path()); })
      .def_prop_ro("size", &data::File::size)
      .def_prop_ro("modified_ns", &data::File::modified_ns)
      .def_prop_ro("mapped", &data::File::mapped)
      .def("read", read_bytes, nb::arg("offset"), nb::arg("bytes"))
      .def("check_faults", nb::overload_cast<>(&data::File::check_faults, nb::const_), Released())
      .def("check_unchanged", &data::File::check_unchanged, Released());

  nb::class_<data::FileIndex>(module, "FileIndex")
      .def(nb::new_(&file_index), nb::arg("records") = std::vector<std::pair<std::uint64_t, std::uint64_t>>())
      .def_prop_ro("records", &data::FileIndex::records)
      .def_prop_ro("end", &data::FileIndex::end)
      .def_prop_ro("damage", damage_of)
      .def_prop_rw("note", &data::FileIndex::note, &data::FileIndex::set_note)
      .def(
          "at",
          [](const data::FileIndex& index, std::uint64_t number) {
            if (number >= index.records()) {
              throw nb::index_error("no such record");
            }
            return index.at(number);
          },
          nb::arg("number"));

  module.def("save_index", save_index, nb::arg("path"), nb::arg("key"), nb::arg("files"), nb::arg("parts"));
  module.def("load_index", load_index, nb::arg("path"), nb::arg("key"), nb::arg("files"), nb::arg("any_time") = false);

  nb::class_<data::Index>(module, "Index")
      .def(nb::init<data::Files, std::vector<std::shared_ptr<const data::FileIndex>>>(), nb::arg("files"),
           nb::arg("parts"))
      .def_prop_ro("records", &data::Index::records)
      .def_prop_ro("bytes", &data::Index::bytes)
      .def_prop_ro("first", &data::Index::first)
      .def(
          "part", [](const data::Index& index, std::size_t file) { return index.parts().at(file); }, nb::arg("file"))
      .def(
          "place",
          [](const data::Index& index, std::uint64_t record) {
            if (record >= index.records()) {
              throw nb::index_error("no such record");
            }
            const data::Place place = index.place(record);
            return nb::make_tuple(place.file, place.offset, place.bytes, place.number);
          },
          nb::arg("record"));
}

}  // namespace launcher::python
