// From Status to the exceptions of safepoint.errors: the only place that knows which class stands for which code.
#pragma once

#include <nanobind/nanobind.h>

#include <utility>

#include "base/status.h"
#include "client/read_error.h"

namespace sp::python {

// With the GIL held. `error` is not OK.
[[noreturn]] void Raise(const ReadError& error);

inline void Check(const Status& status) {
  if (!status.ok()) Raise(status);
}

template <typename T, typename E>
T Value(std::expected<T, E>&& result) {
  if (!result) Raise(std::move(result).error());
  return std::move(*result);
}

// Runs `body`, which touches no Python object, without the GIL.
template <typename Body>
auto Unlocked(const Body& body) {
  nanobind::gil_scoped_release release;
  return body();
}

}  // namespace sp::python
