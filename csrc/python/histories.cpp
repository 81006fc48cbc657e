#include "histories.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "item_index.h"
#include "packing.h"

namespace fastdiff {
namespace {

namespace py = pybind11;
using IntArray = py::array_t<int64_t, py::array::c_style>;

// Everything below reads borrowed references while it holds the GIL, and calls nothing that could run Python code: only
// objects of exactly the built-in types and numpy's own are read. So no list can change under the loops. What is of any
// other type is refused, and with it the whole call: the caller then takes the way through Python.

// The integer that an int or a numpy integer is; nothing for all else, bool and subclasses too.
class IntegerReader {
 public:
  IntegerReader() {
    const py::module_ numpy = py::module_::import("numpy");
    const char* names[] = {"int64", "int32",  "int16",  "int8",     "uint64",
                           "uint32", "uint16", "uint8", "longlong", "ulonglong"};
    for (const char* name : names) kinds_.push_back(numpy.attr(name));
  }

  bool operator()(PyObject* item, int64_t& value) const {
    if (PyLong_CheckExact(item)) return from_int(item, value);
    if (!is_numpy_integer(item)) return false;
    const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(item));
    if (!number) throw py::error_already_set();
    return from_int(number.ptr(), value);
  }

 private:
  static bool from_int(PyObject* number, int64_t& value) {
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(number, &overflow);
    return overflow == 0;
  }

  bool is_numpy_integer(PyObject* item) const {
    const PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(item));
    for (const py::object& known : kinds_) {
      if (kind == known.ptr()) return true;
    }
    return false;
  }

  std::vector<py::object> kinds_;
};

// Calls take(value) for each element of a strided row until it returns false; false then.
template <class T, class Take>
bool each_of(const char* data, py::ssize_t n, py::ssize_t stride, const Take& take) {
  for (py::ssize_t i = 0; i < n; ++i, data += stride) {
    T value;
    std::memcpy(&value, data, sizeof value);
    if (sizeof(T) == 8 && !std::is_signed<T>::value && value > static_cast<T>(INT64_MAX)) return false;
    if (!take(static_cast<int64_t>(value))) return false;
  }
  return true;
}

// The same for an array's own type; false for all but native integers.
template <class Take>
bool each_of(const py::dtype& dtype, const char* data, py::ssize_t n, py::ssize_t stride, const Take& take) {
  if (dtype.byteorder() != '=' && dtype.byteorder() != '|') return false;
  const bool is_signed = dtype.kind() == 'i';
  if (!is_signed && dtype.kind() != 'u') return false;
  switch (dtype.itemsize()) {
    case 1:
      return is_signed ? each_of<int8_t>(data, n, stride, take) : each_of<uint8_t>(data, n, stride, take);
    case 2:
      return is_signed ? each_of<int16_t>(data, n, stride, take) : each_of<uint16_t>(data, n, stride, take);
    case 4:
      return is_signed ? each_of<int32_t>(data, n, stride, take) : each_of<uint32_t>(data, n, stride, take);
    case 8:
      return is_signed ? each_of<int64_t>(data, n, stride, take) : each_of<uint64_t>(data, n, stride, take);
    default:
      return false;
  }
}

// Exactly numpy's array: a subclass may read its elements in its own way.
bool is_array(PyObject* object) { return Py_TYPE(object) == py::detail::npy_api::get().PyArray_Type_; }

// Calls take(item) for each item of an exact list, tuple or range until it returns false; false then, and for all else.
template <class Take>
bool each_item(PyObject* sequence, const Take& take) {
  if (PyList_CheckExact(sequence)) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(sequence); ++i) {
      if (!take(PyList_GET_ITEM(sequence, i))) return false;
    }
    return true;
  }
  if (PyTuple_CheckExact(sequence)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sequence); ++i) {
      if (!take(PyTuple_GET_ITEM(sequence, i))) return false;
    }
    return true;
  }
  if (Py_TYPE(sequence) != &PyRange_Type) return false;
  for (const py::handle item : py::reinterpret_borrow<py::object>(sequence)) {
    if (!take(item.ptr())) return false;
  }
  return true;
}

IntArray as_array(const std::vector<int64_t>& values) {
  return IntArray(static_cast<py::ssize_t>(values.size()), values.data());
}

py::object result(const Packing& packing) {
  const int64_t n_users = packing.n_users(), width = packing.width();
  IntArray window({n_users, width}), lengths(n_users), row_key(n_users);
  packing.write(window.mutable_data(), width, lengths.mutable_data(), row_key.mutable_data());
  return py::make_tuple(std::move(window), std::move(lengths), as_array(packing.rows()), as_array(packing.offsets()),
                        std::move(row_key));
}

// The item ids of one catalogue snapshot, and what reads lists of them.
class ItemIndex {
 public:
  ItemIndex() { py::detail::npy_api::get(); }  // imports numpy, which runs Python code: not in the loops, then
  virtual ~ItemIndex() = default;

  // False where something is not to be read here.
  virtual bool read_lists(PyObject* lists, Packing& packing) const = 0;
  virtual bool read_padded(const py::array&, Packing&) const { return false; }

  py::object pack(PyObject* histories, const Format& format) const {
    Packing packing(format);
    const bool read = is_array(histories) ? read_padded(py::reinterpret_borrow<py::array>(histories), packing)
                                          : read_lists(histories, packing);
    return read ? result(packing) : py::none();
  }

  py::object lists(PyObject* lists) const {
    Packing packing(Format{false, -1, false, 0});
    if (!read_lists(lists, packing)) return py::none();
    return py::make_tuple(as_array(packing.rows()), as_array(packing.offsets()));
  }

 protected:
  // Calls read(list) for each list of an exact list or tuple, and ends it in the packing.
  template <class Read>
  static bool each_list(PyObject* lists, Packing& packing, const Read& read) {
    if (Py_TYPE(lists) == &PyRange_Type) return false;
    return each_item(lists, [&](PyObject* list) { return read(list) && packing.close(); });
  }
};

template <class Index>
class IntegerItems : public ItemIndex {
 public:
  explicit IntegerItems(Index index, std::vector<py::object> kept = {})
      : index_(std::move(index)), kept_(std::move(kept)) {}

  bool read_lists(PyObject* lists, Packing& packing) const override {
    const auto add = [&](int64_t id) { return packing.add(id, index_); };
    const auto add_item = [&](PyObject* item) {
      int64_t id = 0;
      return read_(item, id) && add(id);
    };
    return each_list(lists, packing, [&](PyObject* list) {
      if (!is_array(list)) return each_item(list, add_item);
      const auto array = py::reinterpret_borrow<py::array>(list);
      if (array.ndim() != 1) return false;
      if (array.size() == 0) return true;  // of any type
      const auto* data = static_cast<const char*>(array.data());
      return each_of(array.dtype(), data, array.shape(0), array.strides(0), add);
    });
  }

  bool read_padded(const py::array& array, Packing& packing) const override {
    if (array.ndim() != 2) return false;
    packing.expect_padded(static_cast<size_t>(array.shape(0)), static_cast<size_t>(array.size()));
    const auto* data = static_cast<const char*>(array.data());
    const auto add = [&](int64_t id) { return packing.add(id, index_); };
    const py::dtype dtype = array.dtype();
    for (py::ssize_t user = 0; user < array.shape(0); ++user) {
      const char* row = data + user * array.strides(0);
      if (!each_of(dtype, row, array.shape(1), array.strides(1), add) || !packing.close()) return false;
    }
    return true;
  }

 private:
  Index index_;
  std::vector<py::object> kept_;  // what owns the memory that the index reads
  IntegerReader read_;
};

// Strings: a dict from str to row.
class StringItems : public ItemIndex {
 public:
  explicit StringItems(py::dict index) : index_(std::move(index)) {}

  bool read_lists(PyObject* lists, Packing& packing) const override {
    const auto add_item = [&](PyObject* item) {
      if (!PyUnicode_CheckExact(item)) return false;
      PyObject* row = PyDict_GetItemWithError(index_.ptr(), item);
      if (row == nullptr) {
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        return false;
      }
      const long long number = PyLong_CheckExact(row) ? PyLong_AsLongLong(row) : -1;
      if (number < 0) {
        PyErr_Clear();
        throw std::invalid_argument("ItemIndex.of_strings: rows must be integers in 0 .. 2^63 - 1");
      }
      packing.add_row(number);
      return true;
    };
    return each_list(lists, packing, [&](PyObject* list) { return each_item(list, add_item); });
  }

 private:
  py::dict index_;
};

std::unique_ptr<ItemIndex> of_integers(const IntArray& ids, const IntArray& rows) {
  if (ids.ndim() != 1 || rows.ndim() != 1 || ids.size() != rows.size()) {
    throw std::invalid_argument("ItemIndex.of_integers: ids and rows must be flat and of one length");
  }
  IntegerIndex index(ids.data(), rows.data(), ids.size());
  return std::make_unique<IntegerItems<IntegerIndex>>(std::move(index), std::vector<py::object>{ids, rows});
}

}  // namespace

void bind_item_index(py::module_& module) {
  py::class_<ItemIndex>(module, "ItemIndex", "From item ids to rows, and from histories of them to what a model sees.")
      .def_static(
          "of_rows",
          [](int64_t n_rows, std::vector<int64_t> special) -> std::unique_ptr<ItemIndex> {
            return std::make_unique<IntegerItems<RowIndex>>(RowIndex(n_rows, std::move(special)));
          },
          py::arg("n_rows"), py::arg("special"), "Ids that are row numbers; special rows name no item.")
      .def_static("of_integers", &of_integers, py::arg("ids").noconvert(), py::arg("rows").noconvert(),
                  "ids [n] int64 ascending, each once, and the row of each.")
      .def_static(
          "of_strings",
          [](py::dict index) -> std::unique_ptr<ItemIndex> { return std::make_unique<StringItems>(std::move(index)); },
          py::arg("index"), "A dict from str to row.")
      .def(
          "pack",
          [](const ItemIndex& self, py::handle histories, int64_t pad_id, bool pad_inside, int64_t max_seq_len) {
            if (max_seq_len < 0) throw std::invalid_argument("ItemIndex.pack: max_seq_len must not be negative");
            return self.pack(histories.ptr(), Format{true, pad_id, pad_inside, max_seq_len});
          },
          py::arg("histories"), py::arg("pad_id"), py::arg("pad_inside"), py::arg("max_seq_len"),
          "(window [B, n], lengths [B], rows, offsets [B + 1], row_key [B]), all int64; None where the histories are "
          "not lists, tuples or arrays of ids that are known.")
      .def(
          "lists", [](const ItemIndex& self, py::handle lists) { return self.lists(lists.ptr()); }, py::arg("lists"),
          "(rows, offsets [B + 1]) of B lists without padding; None as for `pack`.");
}

}  // namespace fastdiff
