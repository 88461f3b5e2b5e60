// Status and Result: how every fallible function of safepoint reports failure.
//
// A code is something a *caller can act on*; the message names the object and the bound that was hit. OS and SDK errors become
// a Status at the edge where they enter. The numeric values travel in the socket protocol: append only (docs/formats/socket.md).
#pragma once

#include <cstdint>
#include <expected>
#include <string>
#include <string_view>
#include <utility>

namespace sp {

enum class StatusCode : uint16_t {
  kOk = 0,
  kInvalidArgument = 1,  // The request itself is wrong; repeating it cannot help.
  kNotFound = 2,         // Authoritative: whoever answered knows that it does not exist.
  kUnavailable = 3,      // Nobody who could know can be asked right now; never means "absent" (I-31).
  kIncomplete = 4,       // Known, but not whole (yet).
  kCorrupt = 5,          // Bytes do not match their checksums.
  kFenced = 6,           // A newer generation exists; this writer must stop (I-21).
  kNoSpace = 7,          // Refused before any byte was accepted (I-27).
  kDenied = 8,           // This identity may not do that.
  kLost = 9,             // There were complete steps and none is left.
  kDeadline = 10,        // Not within the deadline; the outcome may be unknown.
  kLimit = 11,           // A limit of docs/operating/settings.md was reached.
  kProtocol = 12,        // The peer speaks another version, or garbage.
  kClosed = 13,          // The attempt, lease or session was closed and will not come back.
  kInternal = 14,        // Our own bug.
};

// Stable upper-case name, e.g. "NO_SPACE"; "UNKNOWN" for a number outside the enum.
std::string_view StatusCodeName(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  std::string ToString() const;  // "NO_SPACE: pool has ..." or "OK"

  friend bool operator==(const Status&, const Status&) = default;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

template <typename T>
using Result = std::expected<T, Status>;

inline std::unexpected<Status> Error(StatusCode code, std::string message) {
  return std::unexpected(Status(code, std::move(message)));
}

}  // namespace sp

// Return the error of a Status expression from a function that returns Status or Result<T>.
#define SP_RETURN_IF_ERROR(expr)                                       \
  do {                                                                 \
    if (::sp::Status sp_status_ = (expr); !sp_status_.ok())            \
      return ::sp::internal::ToReturn(std::move(sp_status_));          \
  } while (0)

#define SP_CONCAT_INNER(a, b) a##b
#define SP_CONCAT(a, b) SP_CONCAT_INNER(a, b)
// SP_ASSIGN_OR_RETURN(auto fd, OpenThing()); moves the value out, or returns the error.
#define SP_ASSIGN_OR_RETURN(lhs, expr) SP_ASSIGN_OR_RETURN_(SP_CONCAT(sp_result_, __LINE__), lhs, expr)
#define SP_ASSIGN_OR_RETURN_(result, lhs, expr)                                        \
  auto result = (expr);                                                                \
  if (!result) return ::sp::internal::ToReturn(std::move(result).error());             \
  lhs = std::move(*result)

namespace sp::internal {
// Converts to Status or to Result<T>, whichever the enclosing function returns.
struct ToReturn {
  explicit ToReturn(Status s) : status(std::move(s)) {}
  operator Status() && { return std::move(status); }
  template <typename T>
  operator std::expected<T, Status>() && { return std::unexpected(std::move(status)); }
  Status status;
};
}  // namespace sp::internal
