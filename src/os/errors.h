// The edge where errno becomes a Status, and the one place that knows about EINTR. Thread-safe.
#pragma once

#include <cerrno>
#include <string>

#include "base/status.h"

namespace sp {

// A Status for a failed system call. `what` names the call and its object, e.g. "open /run/x"; the message gets the
// errno name. ENOENT, ESRCH -> kNotFound; EACCES, EPERM -> kDenied; ENOSPC, ENOMEM, EDQUOT -> kNoSpace; EMFILE, ENFILE,
// ETOOMANYREFS -> kLimit; EAGAIN, ECONNREFUSED, EADDRINUSE -> kUnavailable; EPIPE, ECONNRESET, ENOTCONN -> kClosed;
// ETIMEDOUT -> kDeadline; names that cannot be used and oversized messages -> kInvalidArgument; anything else ->
// kInternal.
Status ErrnoStatus(int err, const std::string& what);

inline std::unexpected<Status> ErrnoError(int err, const std::string& what) {
  return std::unexpected(ErrnoStatus(err, what));
}

// Calls `call` until it succeeds or fails with something other than EINTR. Never use it for close().
template <typename Call>
auto RetryOnEintr(Call call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

}  // namespace sp
