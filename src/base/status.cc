#include "base/status.h"

namespace sp {

std::string_view StatusCodeName(StatusCode code) {
  switch (code) {
    case StatusCode::kOk: return "OK";
    case StatusCode::kInvalidArgument: return "INVALID_ARGUMENT";
    case StatusCode::kNotFound: return "NOT_FOUND";
    case StatusCode::kUnavailable: return "UNAVAILABLE";
    case StatusCode::kIncomplete: return "INCOMPLETE";
    case StatusCode::kCorrupt: return "CORRUPT";
    case StatusCode::kFenced: return "FENCED";
    case StatusCode::kNoSpace: return "NO_SPACE";
    case StatusCode::kDenied: return "DENIED";
    case StatusCode::kLost: return "LOST";
    case StatusCode::kDeadline: return "DEADLINE";
    case StatusCode::kLimit: return "LIMIT";
    case StatusCode::kProtocol: return "PROTOCOL";
    case StatusCode::kClosed: return "CLOSED";
    case StatusCode::kInternal: return "INTERNAL";
  }
  return "UNKNOWN";
}

std::string Status::ToString() const {
  if (ok()) return "OK";
  return std::string(StatusCodeName(code_)) + ": " + message_;
}

}  // namespace sp
