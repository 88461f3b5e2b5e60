// Where memory runs out, whoever called goes on: std::bad_alloc becomes a Status at the edges that must not die of it, which are the public
// calls and the threads of the client library (promise: the trainer is never killed by us) and the turns of the keeper's loop. Pure.
#pragma once

#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "base/status.h"

namespace sp {

// kNoSpace, naming what could not be done if there is memory for that; "out of memory" lies inside the string itself and needs none.
inline Status NoMemory(const char* what) noexcept {
  try {
    return {StatusCode::kNoSpace, std::string("out of memory: ") + what};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kNoSpace, "out of memory"};
  }
}

// A copy, with a shorter message where there is no memory for the whole one.
inline Status CopyStatus(const Status& status) noexcept {
  try {
    return status;
  } catch (const std::bad_alloc&) {
    return {status.code(), "out of memory"};
  }
}

// What `body` returns: a Status, or a std::expected whose error is made from one.
template <typename Body>
auto OrNoMemory(const char* what, Body&& body) -> decltype(body()) {
  using Returned = decltype(body());
  try {
    return std::forward<Body>(body)();
  } catch (const std::bad_alloc&) {
    if constexpr (std::is_same_v<Returned, Status>) return NoMemory(what);
    else return std::unexpected(typename Returned::error_type(NoMemory(what)));
  }
}

}  // namespace sp
