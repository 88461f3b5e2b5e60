#include "errors.h"

#include <nanobind/stl/string.h>

namespace nb = nanobind;

namespace sp::python {
namespace {

const char* ClassName(StatusCode code) {
  switch (code) {
    case StatusCode::kInvalidArgument: return "InvalidArgument";
    case StatusCode::kNotFound: return "NotFound";
    case StatusCode::kUnavailable: return "Unavailable";
    case StatusCode::kIncomplete: return "Incomplete";
    case StatusCode::kCorrupt: return "Corrupt";
    case StatusCode::kFenced: return "Fenced";
    case StatusCode::kNoSpace: return "NoSpace";
    case StatusCode::kDenied: return "Denied";
    case StatusCode::kLost: return "Lost";
    case StatusCode::kDeadline: return "DeadlineExceeded";
    case StatusCode::kLimit: return "LimitExceeded";
    case StatusCode::kProtocol: return "ProtocolError";
    case StatusCode::kClosed: return "Closed";
    case StatusCode::kInternal:
    case StatusCode::kOk: break;
  }
  return "InternalError";
}

}  // namespace

void Raise(const ReadError& error) {
  // Looked up when needed and not at import: safepoint.errors is part of the package that imports us.
  const nb::object kind = nb::module_::import_("safepoint.errors").attr(ClassName(error.status.code()));
  const std::string& text = error.status.message();
  // Text of the daemon or of the system; an exception must not fail for a byte that is no UTF-8.
  const nb::object message = nb::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
  const nb::object instance = kind(message);
  if (error.status.code() == StatusCode::kCorrupt) {
    instance.attr("rank") = error.rank ? nb::cast(*error.rank) : nb::none();
    instance.attr("block") = error.block ? nb::cast(*error.block) : nb::none();
    instance.attr("state_modified") = nb::bool_(error.state_modified);
  }
  PyErr_SetObject(kind.ptr(), instance.ptr());
  throw nb::python_error();
}

}  // namespace sp::python
