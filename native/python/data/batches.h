// Batches of the engine as dicts of arrays.
#ifndef LAUNCHER_PYTHON_DATA_BATCHES_H
#define LAUNCHER_PYTHON_DATA_BATCHES_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine.h"
#include "module.h"

namespace launcher::python {

struct Presentation {
  std::vector<data::Field> fields;
  // What makes a column's value in the dict, for each field, then for the mask and the numbers. fixed: of one array;
  // None gives a NumPy array. ragged: of values and offsets; sparse: of values, offsets and keys.
  std::vector<nb::object> makers;
  bool mask = false, numbers = false;
  bool reuse = false;  // the same objects for the same memory, whether anybody still holds them or not
  // Called when nobody holds a batch any more; what it returns says by query() when the memory is not read any more
  // either, say by a copy to a GPU that was begun with it, and waits for it by synchronize(). None: at once.
  nb::object fence = nb::none();
};

// Arrays of the batches' memory. NumPy arrays are made once for each piece of memory; what a user gets are views of
// them, or of other libraries' arrays that hold on to them. So the count of references to ours tells whether anybody
// still uses the memory, and handing out a batch is a matter of tens of nanoseconds for each column. All of it is done
// with the GIL held.
class Batches {
 public:
  explicit Batches(Presentation presentation);

  std::size_t makers() const noexcept { return presentation_.makers.size(); }
  nb::dict present(data::Lease lease);
  // Gives back to the engine what nobody uses any more; with `reuse`, all.
  void collect();
  // Until what reads the memory of batches that are lent, as far as it was begun by now, is done with it.
  void wait();

 private:
  // An array of all of a piece of memory, whose views the user gets.
  struct Whole {
    const void* begin = nullptr;
    std::size_t elements = 0;  // along the first dimension
    nb::object array;
  };
  struct Column {
    Whole values, keys, offsets;
  };
  // What there is of one batch's memory. It holds on to it, so that no other batch has the same address.
  struct Face {
    const data::Filled* filled = nullptr;
    data::Lease lease;  // null: idle
    nb::object owner;
    nb::object pending;  // what the fence returned
    std::vector<Column> columns;
    Whole mask, numbers;
    nb::dict dict;  // of the last time, with `reuse`
    std::size_t dict_rows = 0;

    bool in_use() const noexcept;
  };

  bool done_with(Face& face) const;
  Face& face_of(const data::Filled& filled);
  static nb::object view(Whole& whole, Face& face, const void* begin, std::size_t count, std::size_t capacity,
                         collectives::DType dtype, const std::vector<std::uint64_t>& inner);
  nb::object make(std::size_t number, Face& face);
  void fill(nb::dict& out, Face& face);

  Presentation presentation_;
  std::vector<nb::object> names_;
  nb::object mask_name_, numbers_name_;
  bool has_growing_ = false;  // columns that are as long as what is in them
  std::vector<Face> faces_;
};

}  // namespace launcher::python

#endif
