#include "os/errors.h"

#include <cstring>

namespace sp {
namespace {

StatusCode CodeOf(int err) {
  switch (err) {
    case ENOENT:
    case ESRCH:
      return StatusCode::kNotFound;
    case EACCES:
    case EPERM:
      return StatusCode::kDenied;
    case ENOSPC:
    case ENOMEM:
    case EDQUOT:
    case ENOBUFS:
      return StatusCode::kNoSpace;
    case EMFILE:
    case ENFILE:
    case ETOOMANYREFS:
      return StatusCode::kLimit;
    case EAGAIN:
    case ECONNREFUSED:
    case ECONNABORTED:
    case EADDRINUSE:
      return StatusCode::kUnavailable;
    case EPIPE:
    case ECONNRESET:
    case ENOTCONN:
      return StatusCode::kClosed;
    case ETIMEDOUT:
      return StatusCode::kDeadline;
    case ENAMETOOLONG:
    case ENOTDIR:
    case EISDIR:
    case ELOOP:
    case EMSGSIZE:
      return StatusCode::kInvalidArgument;
    default:
      return StatusCode::kInternal;
  }
}

}  // namespace

Status ErrnoStatus(int err, const std::string& what) {
  const char* name = strerrorname_np(err);
  const char* description = strerrordesc_np(err);
  std::string message = what + ": ";
  message += name != nullptr ? name : "errno " + std::to_string(err);
  if (description != nullptr) message += std::string(" (") + description + ")";
  return Status(CodeOf(err), std::move(message));
}

}  // namespace sp
