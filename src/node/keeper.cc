#include "node/keeper.h"

#include <signal.h>
#include <unistd.h>

#include "node/keeper_log.h"
#include "node/keeper_loop.h"
#include "os/file_lock.h"
#include "os/files.h"
#include "os/system.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

// Beside the extents: standard streams, sockets, epoll and the like.
constexpr uint64_t kOtherFds = 64;

Status CheckRange(const char* setting, uint64_t value, uint64_t least, uint64_t most) {
  if (value >= least && value <= most) return {};
  return Status(StatusCode::kInvalidArgument, std::string(setting) + " is " + std::to_string(value) + ", allowed are " +
                                                  std::to_string(least) + " to " + std::to_string(most));
}

Status CheckPages(const char* setting, uint64_t bytes) {
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  constexpr uint64_t kMost = 1ULL << 40;
  SP_RETURN_IF_ERROR(CheckRange(setting, bytes, page, kMost));
  if (bytes % page == 0) return {};
  return Status(StatusCode::kInvalidArgument, std::string(setting) + " is " + std::to_string(bytes) +
                                                  ", not a multiple of the page size " + std::to_string(page));
}

// Refuses a pool that cannot be had before any of it is taken; the alternative would be a smaller pool than the
// settings say.
Status CheckRoom(const KeeperConfig& config) {
  const uint64_t needed = config.extents_at_start * config.extent_bytes + config.ledger_bytes;
  SP_ASSIGN_OR_RETURN(const uint64_t available, AvailableMemoryBytes());
  if (needed <= available) return {};
  return Status(StatusCode::kNoSpace, "the pool at start and the ledger need " + std::to_string(needed) + " bytes, " +
                                          std::to_string(available) + " are available");
}

Result<int> SetUpAndRun(const KeeperConfig& config) {
  SP_RETURN_IF_ERROR(ValidateKeeperConfig(config));
  SP_RETURN_IF_ERROR(EnsureFdLimit(config.extents_max + kOtherFds));
  // A vanished reader of stderr must not end the process that holds the memory.
  constexpr int kIgnored[] = {SIGPIPE};
  SP_RETURN_IF_ERROR(BlockSignals(kIgnored));
  constexpr int kHandled[] = {SIGTERM, SIGINT, SIGHUP, SIGCHLD};
  SP_ASSIGN_OR_RETURN(SignalFd signals, SignalFd::Create(kHandled));
  SP_ASSIGN_OR_RETURN(const FileLock lock, FileLock::TryAcquire(config.socket_path + ".keeper"));
  SP_RETURN_IF_ERROR(CheckRoom(config));
  SP_ASSIGN_OR_RETURN(Fd ledger, MakeKeptMemory("safepoint-ledger", config.ledger_bytes));
  SP_ASSIGN_OR_RETURN(Epoll epoll, Epoll::Create());
  SP_ASSIGN_OR_RETURN(Fd listener, ListenUnix(config.socket_path, config.socket_mode));
  KeeperLoop keeper(config, std::move(epoll), std::move(signals), std::move(listener), std::move(ledger));
  const Result<int> code = keeper.Run();
  // Ours for sure, because the lock is still held.
  SP_RETURN_IF_ERROR(RemoveFile(config.socket_path));
  return code;
}

int ExitCodeFor(StatusCode code) {
  switch (code) {
    case StatusCode::kUnavailable:
      return kExitAlreadyRunning;
    case StatusCode::kInternal:
    case StatusCode::kClosed:
      return kExitOs;
    default:
      return kExitConfig;
  }
}

}  // namespace

Status ValidateKeeperConfig(const KeeperConfig& config) {
  SP_RETURN_IF_ERROR(CheckRange("length of the socket path", config.socket_path.size(), 1, kMaxSocketPathBytes));
  SP_RETURN_IF_ERROR(CheckPages("extent_bytes", config.extent_bytes));
  SP_RETURN_IF_ERROR(CheckPages("ledger_bytes", config.ledger_bytes));
  SP_RETURN_IF_ERROR(CheckRange("extents_max", config.extents_max, 1, kMaxExtents));
  SP_RETURN_IF_ERROR(CheckRange("extents_at_start", config.extents_at_start, 0, config.extents_max));
  if (config.worker_argv.empty()) return Status(StatusCode::kInvalidArgument, "worker_argv is empty");
  if (config.grace.count() < 0 || config.backoff_first.count() < 0 || config.backoff_max < config.backoff_first) {
    return Status(StatusCode::kInvalidArgument,
                  "grace and backoff must not be negative, nor backoff_max below backoff_first");
  }
  return {};
}

int RunKeeper(const KeeperConfig& config) {
  const Result<int> code = SetUpAndRun(config);
  if (code) {
    KeeperLog("info", "ended", {{"exit_code", *code}});
    return *code;
  }
  KeeperLog("error", "ended", {{"exit_code", ExitCodeFor(code.error().code())}, {"cause", code.error()}});
  return ExitCodeFor(code.error().code());
}

}  // namespace sp
