// What a save has to know about each tensor (address, dtype, device, shape, whether its bytes are its values), read by torch's DLPack table: no
// Python call but one per tensor, and no build against a torch version. The table does not tell the negative and the conjugate bit, so those are
// asked for; tensors that it refuses (sparse, quantised, on other devices) and those of other classes are described by Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "convert.h"
#include "module.h"
#include "walk.h"
#include "walk_dlpack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

// The table for the major version that we know; null: there is none.
const dlpack::Exchange* FindTable(nb::handle capsule) {
  if (capsule.is_none()) return nullptr;
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) throw nb::python_error();
  for (auto* header = static_cast<dlpack::ExchangeHeader*>(pointer); header != nullptr; header = header->prev_api) {
    if (header->major != dlpack::kMajorVersion) continue;
    const auto* table = reinterpret_cast<const dlpack::Exchange*>(header);
    return table->tensor_from_py_object_no_sync != nullptr ? table : nullptr;
  }
  return nullptr;
}

// Attribute objects of torch (dtypes, devices), numbered so that rows are compared without Python.
class Interned {
 public:
  uint32_t Number(nb::handle object) {
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (objects_[i].is(object) || objects_[i].equal(object)) return static_cast<uint32_t>(i);
    }
    objects_.push_back(nb::borrow(object));
    return static_cast<uint32_t>(objects_.size() - 1);
  }
  const nb::object& operator[](uint32_t number) const { return objects_[number]; }

 private:
  std::vector<nb::object> objects_;
};

struct Row {
  uint64_t address = 0;  // As data_ptr(): 0 for a tensor without elements.
  uint64_t bytes = 0;    // Of its elements.
  uint32_t dtype = 0, device = 0;  // Numbers in the reader.
  uint32_t dimensions = 0;
  bool contiguous = true, negative = false, conjugate = false;
  bool plain = false;  // Of a class that Python named, and read by the table.

  bool SameLayout(const Row& other) const {
    return dtype == other.dtype && device == other.device && dimensions == other.dimensions && contiguous == other.contiguous &&
           negative == other.negative && conjugate == other.conjugate;
  }
};

// As torch decides it: dimensions of size 1 may have any stride, and without elements everything is contiguous.
bool IsContiguous(const dlpack::Tensor& t, uint64_t elements) {
  if (elements == 0 || t.ndim == 0) return true;
  int64_t expected = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (t.strides == nullptr || t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

class Reader {
 public:
  Reader(nb::handle table, const nb::sequence& classes, nb::object is_negative, nb::object is_conjugate, nb::object describe)
      : table_(FindTable(table)), is_negative_(std::move(is_negative)), is_conjugate_(std::move(is_conjugate)), describe_(std::move(describe)) {
    for (const nb::handle kind : classes) classes_.push_back(nb::borrow(kind));
  }

  // For the cyclic collector.
  int Traverse(visitproc visit, void* arg) const {
    for (const nb::object* o : {&is_negative_, &is_conjugate_, &describe_}) Py_VISIT(o->ptr());
    for (const nb::object& c : classes_) Py_VISIT(c.ptr());
    return 0;
  }
  void Clear() {
    for (nb::object* o : {&is_negative_, &is_conjugate_, &describe_}) o->reset();
    classes_.clear();
  }

  bool has_table() const { return table_ != nullptr; }
  const Interned& dtypes() const { return dtypes_; }
  const Interned& devices() const { return devices_; }

  // Appends the shape to `sizes`.
  Row Read(nb::handle tensor, std::vector<int64_t>& sizes) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    const bool known = table_ != nullptr && std::any_of(classes_.begin(), classes_.end(), [&](const nb::object& c) { return c.ptr() == type; });
    Row row;
    if (known && ReadByTable(tensor, row, sizes)) return row;
    return ReadByPython(tensor, sizes);
  }

 private:
  // False: the table refuses this tensor, or does not say enough.
  bool ReadByTable(nb::handle tensor, Row& row, std::vector<int64_t>& sizes) {
    dlpack::Tensor t{};
    if (table_->tensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) {
      // A reason for Python to look at it and not an error yet; but memory or an interrupt is nothing to ignore.
      if (!PyErr_ExceptionMatches(PyExc_RuntimeError) && !PyErr_ExceptionMatches(PyExc_BufferError)) throw nb::python_error();
      PyErr_Clear();
      return false;
    }
    if (t.device_type != dlpack::kCpu && t.device_type != dlpack::kCuda) return false;
    uint64_t elements = 1;
    for (int32_t d = 0; d < t.ndim; ++d) elements *= static_cast<uint64_t>(t.shape[d]);
    row.address = elements == 0 ? 0 : reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    row.dimensions = static_cast<uint32_t>(t.ndim);
    row.contiguous = IsContiguous(t, elements);
    row.plain = true;
    sizes.insert(sizes.end(), t.shape, t.shape + t.ndim);
    // From here on Python runs, and what `t` points to may change.
    row.dtype = Dtype(tensor, t);
    row.bytes = elements * ItemSize(row.dtype);
    row.device = Device(tensor, t);
    row.negative = Ask(is_negative_, tensor);
    row.conjugate = t.code == kComplex && Ask(is_conjugate_, tensor);
    return true;
  }

  Row ReadByPython(nb::handle tensor, std::vector<int64_t>& sizes) {
    const nb::object described = describe_(tensor);
    const auto [address, dtype, device, shape, contiguous, negative, conjugate] =
        nb::cast<std::tuple<uint64_t, nb::object, nb::object, std::vector<int64_t>, bool, bool, bool>>(described);
    Row row{.address = address,
            .dtype = dtypes_.Number(dtype),
            .device = devices_.Number(device),
            .dimensions = static_cast<uint32_t>(shape.size()),
            .contiguous = contiguous,
            .negative = negative,
            .conjugate = conjugate};
    row.bytes = ItemSize(row.dtype);
    for (const int64_t size : shape) row.bytes *= static_cast<uint64_t>(size);
    sizes.insert(sizes.end(), shape.begin(), shape.end());
    return row;
  }

  static bool Ask(const nb::object& method, nb::handle tensor) {
    PyObject* arguments[] = {tensor.ptr()};
    const nb::object answer = Steal(PyObject_Vectorcall(method.ptr(), arguments, 1, nullptr));
    return answer.ptr() == Py_True;
  }

  // Number of the torch.dtype. Some of torch's dtypes share one code (int1 to int8), so only what is certain is remembered.
  uint32_t Dtype(nb::handle tensor, const dlpack::Tensor& t) {
    const uint32_t key = uint32_t{t.code} << 24 | uint32_t{t.bits} << 16 | t.lanes;
    const bool certain = t.lanes == 1 && (((t.code == kFloat || t.code == kInt) && t.bits >= 16) || t.code == kBfloat || t.code == kBool);
    return certain ? Remembered(dtype_of_, key, dtypes_, tensor, "dtype") : dtypes_.Number(nb::getattr(tensor, "dtype"));
  }

  uint64_t ItemSize(uint32_t dtype) {
    while (item_sizes_.size() <= dtype) {
      item_sizes_.push_back(nb::cast<uint64_t>(nb::getattr(dtypes_[static_cast<uint32_t>(item_sizes_.size())], "itemsize")));
    }
    return item_sizes_[dtype];
  }

  uint32_t Device(nb::handle tensor, const dlpack::Tensor& t) {
    const uint32_t key = static_cast<uint32_t>(t.device_type) << 16 | (static_cast<uint32_t>(t.device_id) & 0xffff);
    return Remembered(device_of_, key, devices_, tensor, "device");
  }

  using Keys = std::vector<std::pair<uint32_t, uint32_t>>;  // (DLPack's number, ours); a handful.
  static uint32_t Remembered(Keys& keys, uint32_t key, Interned& objects, nb::handle tensor, const char* attribute) {
    for (const auto& [known, number] : keys) {
      if (known == key) return number;
    }
    const uint32_t number = objects.Number(nb::getattr(tensor, attribute));
    keys.emplace_back(key, number);
    return number;
  }

  static constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6;  // DLDataTypeCode

  const dlpack::Exchange* table_;
  std::vector<nb::object> classes_;
  nb::object is_negative_, is_conjugate_, describe_;
  Interned dtypes_, devices_;
  std::vector<uint64_t> item_sizes_;  // Per dtype, bytes.
  Keys dtype_of_, device_of_;
};

// What is remembered of the tensors of one structure.
class Table {
 public:
  Table(nb::object reader, const nb::list& tensors) : owner_(std::move(reader)), reader_(nb::cast<Reader&>(owner_)) {
    rows_.reserve(nb::len(tensors));
    for (size_t i = 0; i < nb::len(tensors); ++i) rows_.push_back(reader_.Read(nb::borrow(nb::object(tensors[i])), sizes_));
  }

  // Addresses of other tensors of the same layout, one uint64 each; None: something differs.
  std::optional<nb::bytes> Match(const nb::list& tensors) {
    if (nb::len(tensors) != rows_.size()) return std::nullopt;
    std::vector<uint64_t> addresses(rows_.size());
    std::vector<int64_t> shape;
    const int64_t* expected = sizes_.data();
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (i >= nb::len(tensors)) return std::nullopt;  // Changed by what Python was asked.
      shape.clear();
      const Row row = reader_.Read(nb::object(tensors[i]), shape);
      if (!row.SameLayout(rows_[i]) || !std::equal(shape.begin(), shape.end(), expected)) return std::nullopt;
      expected += row.dimensions;
      addresses[i] = row.address;
    }
    return Bytes(addresses);
  }

  size_t size() const { return rows_.size(); }
  nb::bytes addresses() const { return Bytes(Column<uint64_t>([](const Row& r) { return r.address; })); }
  nb::bytes nbytes() const { return Bytes(Column<uint64_t>([](const Row& r) { return r.bytes; })); }
  nb::bytes contiguous() const { return Bytes(Column<uint8_t>([](const Row& r) { return r.contiguous; })); }
  nb::bytes negative() const { return Bytes(Column<uint8_t>([](const Row& r) { return r.negative; })); }
  nb::bytes conjugate() const { return Bytes(Column<uint8_t>([](const Row& r) { return r.conjugate; })); }
  nb::bytes plain() const { return Bytes(Column<uint8_t>([](const Row& r) { return r.plain; })); }

  nb::list dtypes() const { return Objects([&](const Row& r) { return reader_.dtypes()[r.dtype]; }); }
  nb::list devices() const { return Objects([&](const Row& r) { return reader_.devices()[r.device]; }); }
  nb::list shapes() const {
    const int64_t* next = sizes_.data();
    return Objects([&](const Row& r) {
      nb::object shape = Steal(PyTuple_New(r.dimensions));
      for (uint32_t d = 0; d < r.dimensions; ++d) PyTuple_SET_ITEM(shape.ptr(), d, Steal(PyLong_FromLongLong(*next++)).release().ptr());
      return shape;
    });
  }

 private:
  template <typename T>
  static nb::bytes Bytes(const std::vector<T>& values) {
    return ToBytes({reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(T)});
  }
  template <typename T, typename Get>
  std::vector<T> Column(const Get& get) const {
    std::vector<T> column(rows_.size());
    std::transform(rows_.begin(), rows_.end(), column.begin(), get);
    return column;
  }
  template <typename Make>
  nb::list Objects(const Make& make) const {
    nb::list list;
    for (const Row& row : rows_) list.append(make(row));
    return list;
  }

  nb::object owner_;
  Reader& reader_;
  std::vector<Row> rows_;
  std::vector<int64_t> sizes_;  // The shapes, one after the other.
};

int TraverseReader(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<Reader>(self)->Traverse(visit, arg) : 0;
}

int ClearReader(PyObject* self) {
  nb::inst_ptr<Reader>(self)->Clear();
  return 0;
}

PyType_Slot kReaderSlots[] = {{Py_tp_traverse, reinterpret_cast<void*>(TraverseReader)},
                              {Py_tp_clear, reinterpret_cast<void*>(ClearReader)},
                              {0, nullptr}};

}  // namespace

void BindWalkTensors(nb::module_& m) {
  nb::class_<Reader>(m, "TensorReader", nb::type_slots(kReaderSlots), "Reads what a save has to know about tensors.")
      .def(
          "__init__",
          [](Reader* self, const nb::object& table, const nb::sequence& classes, const nb::callable& is_negative, const nb::callable& is_conjugate,
             const nb::callable& describe) { new (self) Reader(table, classes, is_negative, is_conjugate, describe); },
          nb::kw_only(), "table"_a.none(), "classes"_a, "is_negative"_a, "is_conjugate"_a, "describe"_a,
          nb::sig("def __init__(self, *, table: object | None, classes: collections.abc.Sequence[type], "
                  "is_negative: collections.abc.Callable[..., bool], is_conjugate: collections.abc.Callable[..., bool], "
                  "describe: collections.abc.Callable[..., object]) -> None"),
          "`table`: torch.Tensor.__dlpack_c_exchange_api__, or None. `classes` of tensors that may be read by it; the others, and what it refuses, "
          "are told by `describe`: (address, dtype, device, shape, contiguous, negative, conjugate).")
      .def_prop_ro("has_table", &Reader::has_table, "There is a table of a version that is known here.");
  nb::class_<Table>(m, "TensorTable", "Layout and addresses of a list of tensors, as of now. The columns have one item per tensor.")
      .def(
          "__init__",
          [](Table* self, const nb::object& reader, const nb::list& tensors) { new (self) Table(reader, tensors); },
          "reader"_a, "tensors"_a,
          nb::sig("def __init__(self, reader: TensorReader, tensors: collections.abc.Sequence[object]) -> None"),
          "Raises what reading an attribute of a tensor raises.")
      .def("match", &Table::Match, "tensors"_a, nb::sig("def match(self, tensors: collections.abc.Sequence[object]) -> bytes | None"),
           "Addresses (uint64) of other tensors that have dtypes, devices, shapes, contiguity, negative and conjugate bits of these. None: they do not.")
      .def("__len__", &Table::size)
      .def_prop_ro("addresses", &Table::addresses, "uint64, as data_ptr().")
      .def_prop_ro("nbytes", &Table::nbytes, "uint64.")
      .def_prop_ro("contiguous", &Table::contiguous, "bool.")
      .def_prop_ro("negative", &Table::negative, "bool.")
      .def_prop_ro("conjugate", &Table::conjugate, "bool.")
      .def_prop_ro("plain", &Table::plain, "bool: read by the table.")
      .def_prop_ro("dtypes", &Table::dtypes, nb::for_getter(nb::sig("def dtypes(self) -> list[typing.Any]")), "List of torch.dtype.")
      .def_prop_ro("devices", &Table::devices, nb::for_getter(nb::sig("def devices(self) -> list[typing.Any]")), "List of torch.device.")
      .def_prop_ro("shapes", &Table::shapes, nb::for_getter(nb::sig("def shapes(self) -> list[typing.Any]")), "List of tuples.");
}

}  // namespace sp::python
