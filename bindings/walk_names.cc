// Names and paths of everything that a walk met (safepoint._state.describe says what is meant), for thousands of leaves.
#include <nanobind/nanobind.h>

#include <vector>

#include "module.h"
#include "walk.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

class Describer {
 public:
  Describer(const nb::list& tokens, const nb::object& names, nb::handle leaf, const nb::object& path_element, const nb::object& name_leaf)
      : tokens_(tokens),
        names_(names),
        tensors_(nb::cast<nb::list>(names.attr("tensors"))),
        arrays_(nb::cast<nb::list>(names.attr("arrays"))),
        values_(nb::cast<nb::list>(names.attr("values"))),
        parents_(nb::cast<nb::list>(names.attr("parents"))),
        paths_(nb::cast<nb::list>(names.attr("paths"))),
        per_rank_(nb::cast<nb::list>(names.attr("per_rank"))),
        leaf_(reinterpret_cast<PyTypeObject*>(leaf.ptr())),
        path_element_(path_element),
        name_leaf_(name_leaf) {
    if (!PyType_Check(leaf.ptr()) || !PyType_IsSubtype(leaf_, &PyTuple_Type)) throw nb::type_error("a leaf is a named tuple");
  }

  void Run() { Visit(nb::make_tuple(-1, nb::none()), nb::tuple(), nb::str(""), false); }

 private:
  struct Inner {
    nb::object key, path, text, kind;
  };

  void Visit(const nb::object& parent, const nb::object& path, const nb::object& prefix, bool per_rank) {
    const Py_ssize_t number = PyList_GET_SIZE(parents_.ptr());
    if (number >= PyList_GET_SIZE(tokens_.ptr())) throw nb::value_error("the tokens end before the state does");
    const nb::object token = nb::borrow(PyList_GET_ITEM(tokens_.ptr(), number));
    if (!PyTuple_CheckExact(token.ptr()) || PyTuple_GET_SIZE(token.ptr()) != 3) throw nb::type_error("a token has three parts");
    const nb::handle kind = PyTuple_GET_ITEM(token.ptr(), 0), keys = PyTuple_GET_ITEM(token.ptr(), 1), kinds = PyTuple_GET_ITEM(token.ptr(), 2);
    const char code = Code(kind);
    per_rank = per_rank || code == kPerRank;
    Append(parents_, parent);
    Append(paths_, path);
    Append(per_rank_, nb::bool_(per_rank));
    const nb::object container = nb::int_(number);
    const Py_ssize_t depth = PyTuple_GET_SIZE(path.ptr());
    const nb::object dotted = depth == 0 ? nb::object(nb::str("")) : Steal(PyUnicode_Concat(prefix.ptr(), nb::str(".").ptr()));
    std::vector<Inner> inner;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds.ptr()); ++i) {
      const nb::handle child = PyTuple_GET_ITEM(kinds.ptr(), i);
      nb::object key, child_path = path, text = prefix;
      if (keys.is_none()) {
        key = nb::none();
      } else {
        key = PyTuple_Check(keys.ptr()) ? nb::borrow(PyTuple_GET_ITEM(keys.ptr(), i)) : nb::object(nb::int_(i));
        child_path = Extended(path, depth, Element(code, kind, key, keys, prefix));
        text = Steal(PyUnicode_Concat(dotted.ptr(), nb::str(key).ptr()));
      }
      switch (const char child_code = Code(child)) {
        case kTensor: Append(tensors_, Leaf(text, child_path, per_rank, container, key)); break;
        case kArray: Append(arrays_, Leaf(text, child_path, per_rank, container, key)); break;
        case kValue: Append(values_, Leaf(text, child_path, per_rank, container, key)); break;
        default:
          if (IsContainer(child_code)) inner.push_back({key, child_path, text, nb::borrow(child)});
          else name_leaf_(names_, child, Leaf(text, child_path, per_rank, container, key));
      }
    }
    for (const Inner& i : inner) Visit(nb::make_tuple(container, i.key), i.path, i.text, per_rank);
  }

  // Of a path: plain keys are themselves, everything else Python's.
  nb::object Element(char code, nb::handle kind, const nb::object& key, nb::handle keys, const nb::object& prefix) const {
    if (code != kList && code != kTuple && (PyUnicode_CheckExact(key.ptr()) || PyLong_CheckExact(key.ptr()))) return key;
    return path_element_(kind, key, keys, prefix);
  }

  static nb::object Extended(const nb::object& path, Py_ssize_t depth, const nb::object& element) {
    nb::object extended = Steal(PyTuple_New(depth + 1));
    for (Py_ssize_t i = 0; i < depth; ++i) PyTuple_SET_ITEM(extended.ptr(), i, Py_NewRef(PyTuple_GET_ITEM(path.ptr(), i)));
    PyTuple_SET_ITEM(extended.ptr(), depth, Py_NewRef(element.ptr()));
    return extended;
  }

  // A named tuple is a tuple of a class of its own; filled as tuple.__new__ does it.
  nb::object Leaf(const nb::object& name, const nb::object& path, bool per_rank, const nb::object& container, const nb::object& slot) const {
    nb::object leaf = Steal(leaf_->tp_alloc(leaf_, 5));
    PyTuple_SET_ITEM(leaf.ptr(), 0, Py_NewRef(name.ptr()));
    PyTuple_SET_ITEM(leaf.ptr(), 1, Py_NewRef(path.ptr()));
    PyTuple_SET_ITEM(leaf.ptr(), 2, Py_NewRef(per_rank ? Py_True : Py_False));
    PyTuple_SET_ITEM(leaf.ptr(), 3, Py_NewRef(container.ptr()));
    PyTuple_SET_ITEM(leaf.ptr(), 4, Py_NewRef(slot.ptr()));
    return leaf;
  }

  const nb::list tokens_;
  const nb::object names_;
  const nb::list tensors_, arrays_, values_, parents_, paths_, per_rank_;
  PyTypeObject* leaf_;
  const nb::object path_element_, name_leaf_;
};

}  // namespace

void BindWalkNames(nb::module_& m) {
  m.def(
      "describe",
      [](const nb::list& tokens, const nb::object& names, nb::handle leaf, const nb::callable& path_element, const nb::callable& name_leaf) {
        Describer(tokens, names, leaf, path_element, name_leaf).Run();
      },
      "tokens"_a, "names"_a, "leaf"_a, "path_element"_a, "name_leaf"_a,
      nb::sig("def describe(tokens: collections.abc.Sequence[object], names: object, leaf: type, "
              "path_element: collections.abc.Callable[..., object], name_leaf: collections.abc.Callable[..., object]) -> None"),
      "Fills an empty `Names` from the tokens of a walk. `leaf`: the class of its leaves, with five fields; the functions are those of "
      "safepoint._state.");
}

}  // namespace sp::python
