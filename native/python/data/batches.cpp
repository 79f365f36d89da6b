#include "batches.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

namespace launcher::python {
namespace {

using collectives::DType;
using data::Column;
using data::Field;
using data::Filled;
using data::Kind;
using data::size_of;

// NumPy has no bfloat16: its bits are shown as uint16.
nb::dlpack::dtype dtype_of(DType dtype) noexcept {
  using nb::dlpack::dtype_code;
  dtype_code code = dtype_code::UInt;
  switch (dtype) {
    case DType::float32:
    case DType::float64:
    case DType::float16:
      code = dtype_code::Float;
      break;
    case DType::int8:
    case DType::int16:
    case DType::int32:
    case DType::int64:
      code = dtype_code::Int;
      break;
    case DType::boolean:
      code = dtype_code::Bool;
      break;
    default:
      break;
  }
  return {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(size_of(dtype) * 8), 1};
}

nb::object make_array(const void* begin, const std::vector<std::size_t>& shape, DType dtype, nb::handle owner) {
  static std::uint64_t nothing;  // an empty array has an address, too
  void* address = begin == nullptr ? &nothing : const_cast<void*>(begin);
  return nb::cast(nb::ndarray<nb::numpy>(address, shape.size(), shape.data(), owner, nullptr, dtype_of(dtype)),
                  nb::rv_policy::reference);
}

bool used(nb::handle array) noexcept { return array.ptr() != nullptr && Py_REFCNT(array.ptr()) > 1; }

nb::object keep(const Filled& filled) {
  auto memory = std::make_unique<std::shared_ptr<const Filled>>(filled.shared_from_this());
  nb::capsule owner(memory.get(),
                    [](void* held) noexcept { delete static_cast<std::shared_ptr<const Filled>*>(held); });
  memory.release();
  return owner;
}

PyObject* checked(PyObject* object) {
  if (object == nullptr) {
    throw nb::python_error();
  }
  return object;
}

}  // namespace

bool Batches::Face::in_use() const noexcept {
  return used(mask.array) || used(numbers.array) ||
         std::any_of(columns.begin(), columns.end(), [](const Column& column) {
           return used(column.values.array) || used(column.keys.array) || used(column.offsets.array);
         });
}

Batches::Batches(Presentation presentation) : presentation_(std::move(presentation)) {
  const auto intern = [](const char* name) { return nb::steal(PyUnicode_InternFromString(name)); };
  for (const Field& field : presentation_.fields) {
    names_.push_back(intern(field.name.c_str()));
    has_growing_ = has_growing_ || field.kind != Kind::fixed;
  }
  mask_name_ = intern("mask");
  numbers_name_ = intern("record");
}

bool Batches::done_with(Face& face) const {
  if (!presentation_.reuse && face.in_use()) {
    return false;
  }
  if (presentation_.fence.is_none()) {
    return true;
  }
  if (!face.pending.is_valid()) {
    face.pending = presentation_.fence();
  }
  if (!nb::cast<bool>(face.pending.attr("query")())) {
    return false;
  }
  face.pending.reset();
  return true;
}

void Batches::collect() {
  for (std::size_t number = 0; number < faces_.size();) {
    Face& face = faces_[number];
    if (face.lease == nullptr || !done_with(face)) {
      ++number;
      continue;
    }
    const std::weak_ptr<const Filled> memory = face.filled->weak_from_this();
    face.lease.reset();
    if (memory.use_count() > 1) {  // the owner is one
      ++number;
    } else {  // the engine has given it up
      std::swap(face, faces_.back());
      faces_.pop_back();
    }
  }
}

void Batches::wait() {
  for (Face& face : faces_) {
    if (face.lease == nullptr || presentation_.fence.is_none()) {
      continue;
    }
    if (!face.pending.is_valid()) {
      face.pending = presentation_.fence();
    }
    face.pending.attr("synchronize")();
  }
}

Batches::Face& Batches::face_of(const Filled& filled) {
  const auto found =
      std::find_if(faces_.begin(), faces_.end(), [&filled](const Face& face) { return face.filled == &filled; });
  if (found != faces_.end()) {
    return *found;
  }
  Face face;
  face.filled = &filled;
  face.owner = keep(filled);
  face.columns.resize(presentation_.fields.size());
  faces_.push_back(std::move(face));
  return faces_.back();
}

// A view of the first `count` elements at `begin`, where there are `capacity` in all.
nb::object Batches::view(Whole& whole, Face& face, const void* begin, std::size_t count, std::size_t capacity,
                         DType dtype, const std::vector<std::uint64_t>& inner) {
  if (!whole.array.is_valid() || whole.begin != begin || whole.elements != capacity) {
    std::vector<std::size_t> shape{capacity};
    shape.insert(shape.end(), inner.begin(), inner.end());
    whole.array = make_array(begin, shape, dtype, face.owner);
    whole.begin = begin;
    whole.elements = capacity;
  }
  if (count == capacity) {
    return nb::steal(checked(PyObject_GetItem(whole.array.ptr(), Py_Ellipsis)));
  }
  const nb::object part = nb::steal(checked(PySlice_New(nullptr, nb::int_(count).ptr(), nullptr)));
  return nb::steal(checked(PyObject_GetItem(whole.array.ptr(), part.ptr())));
}

nb::object Batches::make(std::size_t number, Face& face) {
  const Field& field = presentation_.fields[number];
  const nb::object& maker = presentation_.makers[number];
  const data::Column& column = face.filled->batch.columns[number];
  const std::size_t rows = face.filled->batch.rows;
  Column& arrays = face.columns[number];
  static const std::vector<std::uint64_t> flat;
  if (field.kind == Kind::fixed) {
    nb::object array =
        view(arrays.values, face, column.values.data(), rows, face.filled->batch.capacity, field.dtype, field.shape);
    return maker.is_none() ? array : maker(array);
  }
  const auto count = static_cast<std::size_t>(column.offsets[rows]);
  nb::object values = view(arrays.values, face, column.values.data(), count,
                           column.values.capacity() / size_of(field.dtype), field.dtype, flat);
  nb::object offsets =
      view(arrays.offsets, face, column.offsets.data(), rows + 1, column.offsets.size(), DType::int64, flat);
  if (field.kind == Kind::ragged) {
    return maker(values, offsets);
  }
  // Keys are numbers of values in a row: far below what int64 holds, which is what other libraries take.
  nb::object keys = view(arrays.keys, face, column.keys.data(), count, column.keys.capacity() / sizeof(std::uint64_t),
                         DType::int64, flat);
  return maker(values, offsets, keys);
}

void Batches::fill(nb::dict& out, Face& face) {
  const auto set = [&out](const nb::object& name, const nb::object& value) {
    if (PyDict_SetItem(out.ptr(), name.ptr(), value.ptr()) != 0) {
      throw nb::python_error();
    }
  };
  static const std::vector<std::uint64_t> flat;
  const Filled& filled = *face.filled;
  const std::size_t rows = filled.batch.rows, capacity = filled.batch.capacity;
  const std::size_t fields = presentation_.fields.size();
  for (std::size_t number = 0; number < fields; ++number) {
    set(names_[number], make(number, face));
  }
  if (presentation_.mask) {
    nb::object mask = view(face.mask, face, filled.mask.data(), rows, capacity, DType::boolean, flat);
    const nb::object& maker = presentation_.makers[fields];
    set(mask_name_, maker.is_none() ? mask : maker(mask));
  }
  if (presentation_.numbers) {
    nb::object numbers = view(face.numbers, face, filled.records.data(), rows, capacity, DType::int64, flat);
    const nb::object& maker = presentation_.makers[fields + 1];
    set(numbers_name_, maker.is_none() ? numbers : maker(numbers));
  }
}

nb::dict Batches::present(data::Lease lease) {
  Face& face = face_of(*lease);
  face.lease = std::move(lease);
  const std::size_t rows = face.filled->batch.rows;
  if (!presentation_.reuse) {
    nb::dict out;
    fill(out, face);
    return out;
  }
  if (face.dict_rows != rows || rows == 0 || has_growing_) {
    fill(face.dict, face);
    face.dict_rows = rows;
  }
  return face.dict;
}

}  // namespace launcher::python
