// What the files of the walk share: the kinds that tokens are made of, and small helpers. With the GIL held.
#pragma once

#include <nanobind/nanobind.h>

namespace sp::python {

// The kinds of safepoint._state that are handled here; leaves of every other kind are Python's.
inline constexpr char kTensor = 't', kArray = 'n', kValue = 'v', kDict = 'd', kList = 'l', kTuple = 'u', kDataclass = 'a', kStateful = 's',
                      kPerRank = 'p';

// 0 for a text that is no single ASCII character.
inline char Code(nanobind::handle kind) {
  if (PyUnicode_GET_LENGTH(kind.ptr()) != 1) return 0;
  const Py_UCS4 character = PyUnicode_READ_CHAR(kind.ptr(), 0);
  return character < 0x80 ? static_cast<char>(character) : '\0';
}

inline bool IsContainer(char code) {
  return code == kDict || code == kList || code == kTuple || code == kDataclass || code == kStateful || code == kPerRank;
}
inline bool IsCommon(char code) { return code == kTensor || code == kArray || code == kValue || IsContainer(code); }

// A new reference, or the exception that was set.
inline nanobind::object Steal(PyObject* result) {
  if (result == nullptr) throw nanobind::python_error();
  return nanobind::steal(result);
}

inline void Append(nanobind::handle list, nanobind::handle item) {
  if (PyList_Append(list.ptr(), item.ptr()) != 0) throw nanobind::python_error();
}

}  // namespace sp::python
