// The topics of the extension; each function adds one of them to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace sp::python {

void BindBase(nanobind::module_& m);
void BindInfo(nanobind::module_& m);
void BindSave(nanobind::module_& m);
void BindRead(nanobind::module_& m);
void BindStore(nanobind::module_& m);
void BindClient(nanobind::module_& m);
void BindWalk(nanobind::module_& m);
void BindWalkTensors(nanobind::module_& m);
void BindHeader(nanobind::module_& m);
void BindWalkNames(nanobind::module_& m);

}  // namespace sp::python
