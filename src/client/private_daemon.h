// Starts the private daemon of this user when nobody serves the socket. Thread-safe.
//
// Of many processes that want to start one, one does, under a file lock that it holds until the daemon answers; the others wait. The
// daemon runs in its own session as a child of init, so it outlives whoever started it.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace sp {

struct StartOptions {
  std::string daemon_path;             // The program; not searched for.
  std::vector<std::string> arguments;  // Without argv[0].
  std::string lock_path;
  std::string log_path;                // Gets its stdout and stderr; appended to, readable by this user only.
};

// Returns when something listens at `socket_path`; true when this call started it. kUnavailable, with the last lines of its log: the
// daemon ended, or does not listen by `deadline` (it is left running).
Result<bool> EnsureDaemon(const StartOptions& options, const std::string& socket_path, Nanos deadline);

}  // namespace sp
