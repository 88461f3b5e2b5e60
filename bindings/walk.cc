// The walk of a training state (python/safepoint/_state.py has the rules and the reference implementation, `_Walker`; the tests hold the two against
// each other). Unlike the rest of the bindings this is logic, because it is CPython code: thousands of small objects are visited per save.
//
// What happens here: exact dicts, lists and tuples, and leaves of the classes that Python names. Everything else is Python's: which kind an object
// of another class is, what is in a container of another kind (dataclass, Stateful, PerRank, other mappings), leaves that are neither tensor, array
// nor value (DTensors). Python code can run in between and change the state, so every container is copied before anybody looks at its children.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "module.h"
#include "walk.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {
namespace {

bool SameText(nb::handle a, nb::handle b) {
  if (a.is(b)) return true;
  if (!PyUnicode_Check(a.ptr()) || !PyUnicode_Check(b.ptr())) return false;
  return PyUnicode_GET_LENGTH(a.ptr()) == PyUnicode_GET_LENGTH(b.ptr()) && PyUnicode_Compare(a.ptr(), b.ptr()) == 0;
}

// Equal keys of equal types: 1, True and 1.0 are one key of a dict and three names.
bool SameKey(nb::handle a, nb::handle b) {
  if (a.is(b)) return true;
  if (Py_TYPE(a.ptr()) != Py_TYPE(b.ptr())) return false;
  if (PyTuple_CheckExact(a.ptr())) {
    const Py_ssize_t size = PyTuple_GET_SIZE(a.ptr());
    if (size != PyTuple_GET_SIZE(b.ptr())) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!SameKey(PyTuple_GET_ITEM(a.ptr(), i), PyTuple_GET_ITEM(b.ptr(), i))) return false;
    }
    return true;
  }
  const int equal = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
  if (equal < 0) throw nb::python_error();
  return equal == 1;
}

class Recursion {
 public:
  Recursion() {
    if (Py_EnterRecursiveCall(" while walking the state") != 0) throw nb::python_error();
  }
  ~Recursion() { Py_LeaveRecursiveCall(); }
  Recursion(const Recursion&) = delete;
  Recursion& operator=(const Recursion&) = delete;
};

// What Python decides, and the classes whose kind needs no question.
struct Rules {
  struct Known {
    nb::object type, kind;
  };
  std::vector<Known> known;
  nb::object kind_of, open_container, open_leaf, add_leaf, stored_value, too_deep;
  nb::object dict_kind, list_kind, tuple_kind, value_kind;
  size_t depth_max = 0;
  Py_ssize_t long_min = 0;  // Elements from which Python decides about a list or tuple.

  nb::object KindOf(nb::handle value) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()));
    for (const Known& k : known) {
      if (k.type.ptr() == type) return k.kind;
    }
    if (PyDict_CheckExact(value.ptr())) return PyDict_GET_SIZE(value.ptr()) != 0 ? dict_kind : value_kind;
    if (PyList_CheckExact(value.ptr())) return SequenceKind(value, list_kind);
    if (PyTuple_CheckExact(value.ptr())) return SequenceKind(value, tuple_kind);
    const nb::object kind = kind_of(value);
    if (!PyUnicode_Check(kind.ptr())) throw nb::type_error("the kind of an object is a text");
    return kind;
  }

  // A list or tuple of nothing but values is one value itself.
  nb::object SequenceKind(nb::handle sequence, const nb::object& kind) const {
    if (PySequence_Fast_GET_SIZE(sequence.ptr()) >= long_min) return kind_of(sequence);  // It may be stored like an array.
    const Recursion recursion;
    // By index and with the length asked for anew: a question to Python may change the list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr()); ++i) {
      const nb::object item = nb::borrow(PySequence_Fast_GET_ITEM(sequence.ptr(), i));
      if (Code(KindOf(item)) != kValue) return kind;
    }
    return value_kind;
  }
};

// One walk.
class Pass {
 public:
  // `expected`: tokens of an earlier walk, or not valid.
  Pass(const Rules& rules, const nb::object& flat, const nb::object& expected)
      : rules_(rules),
        flat_(flat),
        tokens_(nb::cast<nb::list>(flat.attr("tokens"))),
        containers_(nb::cast<nb::list>(flat.attr("containers"))),
        tensors_(nb::cast<nb::list>(flat.attr("tensors"))),
        arrays_(nb::cast<nb::list>(flat.attr("arrays"))),
        values_(nb::cast<nb::list>(flat.attr("values"))),
        expected_(expected),
        same_(!expected.is_none()) {}

  bool Run(const nb::object& kind, const nb::object& state) {
    Visit(kind, state);
    return same_ && PyList_GET_SIZE(expected_.ptr()) == PyList_GET_SIZE(tokens_.ptr());
  }

 private:
  using Objects = std::vector<nb::object>;

  // Takes the children out of a container; returns its keys: a tuple, a number for lists and tuples, None for the others. The keys of the expected
  // token where they are the same.
  nb::object Open(char code, nb::handle kind, nb::handle container, nb::handle expected_keys, Objects& children) {
    if (code == kDict && PyDict_CheckExact(container.ptr())) return OpenDict(container, expected_keys, children);
    nb::object keys, held;
    if (code == kList || code == kTuple) {
      // A list, a tuple or of a class derived from one.
      held = PyList_Check(container.ptr()) ? Steal(PySequence_Tuple(container.ptr())) : nb::borrow(container);
      keys = Steal(PyLong_FromSsize_t(PyTuple_GET_SIZE(held.ptr())));
    } else {
      const nb::object opened = rules_.open_container(flat_, kind, container);
      if (!PyTuple_Check(opened.ptr()) || PyTuple_GET_SIZE(opened.ptr()) != 2) throw nb::type_error("keys and children were expected");
      keys = nb::borrow(PyTuple_GET_ITEM(opened.ptr(), 0));
      held = Steal(PySequence_Tuple(PyTuple_GET_ITEM(opened.ptr(), 1)));
    }
    const Py_ssize_t size = PyTuple_GET_SIZE(held.ptr());
    children.reserve(static_cast<size_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) children.push_back(nb::borrow(PyTuple_GET_ITEM(held.ptr(), i)));
    const Py_ssize_t named = PyTuple_Check(keys.ptr()) ? PyTuple_GET_SIZE(keys.ptr()) : keys.is_none() ? 1 : size;
    if (named != size) throw nb::value_error("a container of the state has other numbers of keys and of values");
    if (expected_keys.is_valid() && SameKey(keys, expected_keys)) return nb::borrow(expected_keys);
    return keys;
  }

  nb::object OpenDict(nb::handle dict, nb::handle expected_keys, Objects& children) {
    const Py_ssize_t size = PyDict_GET_SIZE(dict.ptr());
    const bool comparable = expected_keys.is_valid() && PyTuple_CheckExact(expected_keys.ptr()) && PyTuple_GET_SIZE(expected_keys.ptr()) == size;
    bool identical = comparable;
    nb::object keys = comparable ? nb::borrow(expected_keys) : Steal(PyTuple_New(size));
    children.reserve(static_cast<size_t>(size));
    PyObject *key, *value;
    Py_ssize_t position = 0;
    // No Python code runs in these loops, so the dict stays as it is.
    for (Py_ssize_t i = 0; PyDict_Next(dict.ptr(), &position, &key, &value) != 0; ++i) {
      children.push_back(nb::borrow(value));
      if (!comparable) PyTuple_SET_ITEM(keys.ptr(), i, Py_NewRef(key));
      else identical = identical && PyTuple_GET_ITEM(keys.ptr(), i) == key;
    }
    if (!comparable || identical) return keys;
    keys = Steal(PyTuple_New(size));
    position = 0;
    for (Py_ssize_t i = 0; PyDict_Next(dict.ptr(), &position, &key, &value) != 0; ++i) PyTuple_SET_ITEM(keys.ptr(), i, Py_NewRef(key));
    return SameKey(keys, expected_keys) ? nb::borrow(expected_keys) : keys;
  }

  // The token of this container in the expected list; not valid when there is none or it is of another kind.
  nb::handle Expected(nb::handle kind) const {
    const Py_ssize_t number = PyList_GET_SIZE(tokens_.ptr());
    if (!same_ || number >= PyList_GET_SIZE(expected_.ptr())) return {};
    const nb::handle token = PyList_GET_ITEM(expected_.ptr(), number);
    if (!PyTuple_CheckExact(token.ptr()) || PyTuple_GET_SIZE(token.ptr()) != 3) throw nb::type_error("a token has three parts");
    return SameText(PyTuple_GET_ITEM(token.ptr(), 0), kind) ? token : nb::handle();
  }

  void Visit(const nb::object& kind, const nb::object& container) {
    const char code = Code(kind);
    Append(containers_, container);
    const nb::object expected = nb::borrow(Expected(kind));
    const nb::handle expected_keys = expected.is_valid() ? nb::handle(PyTuple_GET_ITEM(expected.ptr(), 1)) : nb::handle();
    Objects children;
    const nb::object keys = Open(code, kind, container, expected_keys, children);
    const size_t size = children.size();

    // The kinds of the children: the expected tuple as long as they agree.
    const nb::handle expected_kinds = expected.is_valid() ? nb::handle(PyTuple_GET_ITEM(expected.ptr(), 2)) : nb::handle();
    bool same = expected_kinds.is_valid() && keys.is(expected_keys) && PyTuple_GET_SIZE(expected_kinds.ptr()) == static_cast<Py_ssize_t>(size);
    Objects kinds, opened;  // `opened`: what add_leaf needs, of the leaves that are Python's, in their order.
    kinds.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      kinds.push_back(rules_.KindOf(children[i]));
      if (!IsCommon(Code(kinds.back()))) {
        auto [kind_of_leaf, what] = OpenLeaf(kinds.back(), children[i]);
        kinds.back() = std::move(kind_of_leaf);
        if (Code(kinds.back()) != kValue) opened.push_back(std::move(what));
      }
      same = same && SameText(kinds.back(), PyTuple_GET_ITEM(expected_kinds.ptr(), static_cast<Py_ssize_t>(i)));
    }
    if (same) {
      Append(tokens_, expected);
    } else {
      same_ = false;
      const nb::object texts = Steal(PyTuple_New(static_cast<Py_ssize_t>(size)));
      for (size_t i = 0; i < size; ++i) PyTuple_SET_ITEM(texts.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(kinds[i].ptr()));
      Append(tokens_, nb::make_tuple(kind, keys, texts));
    }

    bool inner = false;
    auto next_opened = opened.begin();
    for (size_t i = 0; i < size; ++i) {
      switch (const char child = Code(kinds[i])) {
        case kTensor: Append(tensors_, children[i]); break;
        case kArray: Append(arrays_, children[i]); break;
        case kValue: AddValue(children[i]); break;
        default:
          if (IsContainer(child)) inner = true;
          else rules_.add_leaf(flat_, children[i], *next_opened++);
      }
    }
    if (inner) VisitInner(keys, kinds, children);
  }

  std::pair<nb::object, nb::object> OpenLeaf(nb::handle kind, nb::handle value) const {
    const nb::object result = rules_.open_leaf(kind, value);
    if (!PyTuple_Check(result.ptr()) || PyTuple_GET_SIZE(result.ptr()) != 2 || !PyUnicode_Check(PyTuple_GET_ITEM(result.ptr(), 0))) {
      throw nb::type_error("a kind and what belongs to it were expected");
    }
    const char code = Code(PyTuple_GET_ITEM(result.ptr(), 0));
    if (IsCommon(code) && code != kValue) throw nb::type_error("a leaf of a kind of its own cannot become a tensor, array or container");
    return {nb::borrow(PyTuple_GET_ITEM(result.ptr(), 0)), nb::borrow(PyTuple_GET_ITEM(result.ptr(), 1))};
  }

  void VisitInner(const nb::object& keys, const Objects& kinds, const Objects& children) {
    if (path_.size() > rules_.depth_max) RefuseDepth();
    for (size_t i = 0; i < children.size(); ++i) {
      if (!IsContainer(Code(kinds[i]))) continue;
      path_.push_back({keys, static_cast<Py_ssize_t>(i)});
      Visit(kinds[i], children[i]);
      path_.pop_back();
    }
  }

  void AddValue(nb::handle value) {
    const PyTypeObject* type = Py_TYPE(value.ptr());
    const bool plain = value.is_none() || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type || type == &PyUnicode_Type ||
                       type == &PyList_Type || type == &PyTuple_Type;
    if (plain) Append(values_, value);
    else Append(values_, rules_.stored_value(value));
  }

  [[noreturn]] void RefuseDepth() {
    nb::list path;
    for (const auto& [keys, index] : path_) {
      if (PyTuple_Check(keys.ptr())) path.append(nb::borrow(PyTuple_GET_ITEM(keys.ptr(), index)));
      else if (keys.is_none()) path.append(nb::none());
      else path.append(index);
    }
    rules_.too_deep(path);
    throw nb::type_error("a state that is too deep was not refused");
  }

  const Rules& rules_;
  const nb::object flat_;
  const nb::list tokens_, containers_, tensors_, arrays_, values_;
  const nb::object expected_;
  bool same_;
  std::vector<std::pair<nb::object, Py_ssize_t>> path_;  // (keys, which of them) of the containers above.
};

Rules MakeRules(const nb::dict& kinds, nb::object kind_of, nb::object open_container, nb::object open_leaf, nb::object add_leaf,
                nb::object stored_value, nb::object too_deep, size_t depth_max, size_t long_min) {
  Rules rules{.kind_of = std::move(kind_of),
              .open_container = std::move(open_container),
              .open_leaf = std::move(open_leaf),
              .add_leaf = std::move(add_leaf),
              .stored_value = std::move(stored_value),
              .too_deep = std::move(too_deep),
              .dict_kind = nb::str(&kDict, 1),
              .list_kind = nb::str(&kList, 1),
              .tuple_kind = nb::str(&kTuple, 1),
              .value_kind = nb::str(&kValue, 1),
              .depth_max = depth_max,
              .long_min = static_cast<Py_ssize_t>(long_min)};
  for (const auto [type, kind] : kinds) rules.known.push_back({nb::borrow(type), nb::borrow(kind)});
  return rules;
}

// For the cyclic collector: the functions' modules hold the rules.
int TraverseRules(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const Rules& r = *nb::inst_ptr<Rules>(self);
  for (const nb::object* o : {&r.kind_of, &r.open_container, &r.open_leaf, &r.add_leaf, &r.stored_value, &r.too_deep}) Py_VISIT(o->ptr());
  for (const Rules::Known& k : r.known) Py_VISIT(k.type.ptr());
  return 0;
}

int ClearRules(PyObject* self) {
  Rules& r = *nb::inst_ptr<Rules>(self);
  for (nb::object* o : {&r.kind_of, &r.open_container, &r.open_leaf, &r.add_leaf, &r.stored_value, &r.too_deep}) o->reset();
  r.known.clear();
  return 0;
}

PyType_Slot kRulesSlots[] = {{Py_tp_traverse, reinterpret_cast<void*>(TraverseRules)},
                             {Py_tp_clear, reinterpret_cast<void*>(ClearRules)},
                             {0, nullptr}};

}  // namespace

void BindWalk(nb::module_& m) {
  nb::class_<Rules>(m, "WalkRules", nb::type_slots(kRulesSlots),
                    "What Python decides in a walk (functions of safepoint._state), and the classes whose kind is known.")
      .def(
          "__init__",
          [](Rules* self, const nb::dict& kinds, const nb::callable& kind_of, const nb::callable& open_container, const nb::callable& open_leaf,
             const nb::callable& add_leaf, const nb::callable& stored_value, const nb::callable& too_deep, size_t depth_max,
             size_t long_min) {
            new (self) Rules(MakeRules(kinds, kind_of, open_container, open_leaf, add_leaf, stored_value, too_deep, depth_max, long_min));
          },
          nb::kw_only(), "kinds"_a, "kind_of"_a, "open_container"_a, "open_leaf"_a, "add_leaf"_a, "stored_value"_a, "too_deep"_a, "depth_max"_a,
          "long_min"_a,
          nb::sig("def __init__(self, *, kinds: dict[type, str], kind_of: collections.abc.Callable[..., str], "
                  "open_container: collections.abc.Callable[..., object], open_leaf: collections.abc.Callable[..., object], "
                  "add_leaf: collections.abc.Callable[..., object], stored_value: collections.abc.Callable[..., object], "
                  "too_deep: collections.abc.Callable[..., object], depth_max: int, long_min: int) -> None"))
      .def(
          "walk",
          [](const Rules& rules, const nb::object& flat, const nb::str& kind, const nb::object& state, const std::optional<nb::list>& expected) {
            return Pass(rules, flat, expected ? nb::object(*expected) : nb::none()).Run(kind, state);
          },
          "flat"_a, "kind"_a, "state"_a, "expected"_a.none(),
          nb::sig("def walk(self, flat: object, kind: str, state: object, expected: collections.abc.Sequence[object] | None) -> bool"),
          "Fills an empty `Flat`. True: it has the `expected` tokens of an earlier walk, these very objects. Raises what the state's own methods "
          "raise.");
}

}  // namespace sp::python
