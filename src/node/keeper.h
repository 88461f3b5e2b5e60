// The keeper: the process that holds the node's memory and keeps a worker running. Its death is the loss of the node's
// memory, so it does little, accepts fixed-size commands from its own worker only, and parses nothing from outside.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "node/keeper_extents.h"

namespace sp {

// Exit codes of the keeper, those of sysexits.h. kExitConfig from the worker ends the keeper with it: no restart cures
// settings.
inline constexpr int kExitConfig = 78;
inline constexpr int kExitOs = 71;
inline constexpr int kExitAlreadyRunning = 75;

struct KeeperConfig {
  std::string socket_path;  // The keeper's lock is beside it, under the same name and ".keeper".
  mode_t socket_mode = 0600;
  uint64_t extent_bytes = 64ULL << 20;  // A multiple of the page size.
  uint32_t extents_at_start = 0;        // Get the ids 0, 1, ...
  uint32_t extents_max = 0;             // At most kMaxExtents, not less than extents_at_start.
  uint64_t ledger_bytes = 16ULL << 20;  // A multiple of the page size.
  LockMemory lock = LockMemory::kOff;
  std::string worker_executable = "/proc/self/exe";
  std::vector<std::string> worker_argv;  // With argv[0]. The worker gets descriptors 3 and 4 (keeper_protocol.h).
  std::chrono::milliseconds grace{30'000};  // From SIGTERM to SIGKILL.
  // A worker that died starts again at once; then after backoff_first, doubling up to backoff_max; from the beginning
  // once one lived for backoff_reset.
  std::chrono::milliseconds backoff_first{50};
  std::chrono::milliseconds backoff_max{250};  // A save in progress waits for it; four starts a second cost next to nothing.
  std::chrono::milliseconds backoff_reset{1'000};
};

// kInvalidArgument, naming the setting and its bound.
Status ValidateKeeperConfig(const KeeperConfig& config);

// Runs until SIGTERM, SIGINT, or the worker's wish; the exit code of the process. 0 after an orderly end, also when the
// worker had to be killed. SIGHUP goes to the worker. To be called on the main thread of a process without other
// threads: the worker dies with it.
int RunKeeper(const KeeperConfig& config);

}  // namespace sp
