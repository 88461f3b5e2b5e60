#include "module.h"

NB_MODULE(_core, m) {
  // At the end of the interpreter objects of ours may still be held by threads and by modules that are never torn down.
  nanobind::set_leak_warnings(false);
  m.doc() = "safepoint's C++ client library. Private: use the safepoint package.";
  sp::python::BindBase(m);
  sp::python::BindInfo(m);
  sp::python::BindSave(m);
  sp::python::BindRead(m);
  sp::python::BindStore(m);
  sp::python::BindClient(m);
  sp::python::BindWalk(m);
  sp::python::BindWalkTensors(m);
  sp::python::BindHeader(m);
  sp::python::BindWalkNames(m);
}
