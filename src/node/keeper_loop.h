// The keeper's event loop: one worker at a time, its commands, its restarts. Runs on the main thread of a process
// without others.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "node/keeper.h"
#include "node/keeper_protocol.h"
#include "os/epoll.h"
#include "os/process.h"
#include "os/signals.h"

namespace sp {

class KeeperLoop {
 public:
  // `config` is valid and outlives the loop. `signals` reads SIGTERM, SIGINT, SIGHUP and SIGCHLD.
  KeeperLoop(const KeeperConfig& config, Epoll epoll, SignalFd signals, Fd listener, Fd ledger);

  // The exit code of the process, after the worker's end. An error when not even a first worker could be started, or
  // the loop itself cannot work.
  Result<int> Run();

 private:
  struct PendingRange {
    uint64_t next;
    uint64_t end;
    uint64_t request_id;
    bool of_start;  // Wanted by the settings, so it outlives any worker.
  };
  struct Output {
    KeeperFrame frame;
    // Owned by ledger_ and extents_. They stay open: commands, and so drops, are handled only while no output waits.
    std::vector<int> fds;
  };
  static constexpr Nanos kNever = std::numeric_limits<Nanos>::max();

  Status Turn();
  int TimeoutMs() const;
  void HandleTimers();
  void HandleSignals();
  void WatchSignals(bool watch);

  Status StartWorker();
  void ScheduleRestart();
  void SignalWorker(int signal);
  void KillWorker(std::string_view cause, const Status& status = {});
  void ReapWorker();
  void BeginStop(std::string_view cause);

  void CloseControl();
  void HandleControl();
  Status HandleCommand(const KeeperFrame& frame);  // An error is a worker that cannot be trusted.
  void Attach(const KeeperFrame& frame);
  void QueueCreation(const KeeperFrame& frame);
  StatusCode CheckCreation(uint64_t first, uint64_t count) const;
  void Answer(const KeeperFrame& question, KeeperCommand command, StatusCode code);
  void FlushOutput();

  // One per turn of the loop, so that signals and the worker's death never wait for more than one.
  void CreateOneExtent();
  uint64_t PendingExtents() const;

  const KeeperConfig& config_;
  Epoll epoll_;
  SignalFd signals_;
  Fd listener_;
  Fd ledger_;
  KeeperExtents extents_;
  std::deque<PendingRange> pending_;

  std::optional<ChildProcess> worker_;
  uint64_t incarnation_ = 0;
  Nanos started_at_ = 0;
  Fd control_;
  uint32_t watched_ = 0;  // What epoll_ reports of control_.
  bool attached_ = false;
  std::deque<Output> output_;

  Nanos backoff_ = 0;
  Nanos restart_at_ = kNever;
  Nanos kill_at_ = kNever;
  Nanos retry_at_ = kNever;
  Nanos signals_at_ = kNever;  // When signals that could not be read are watched again.
  bool no_memory_ = false;  // The last turn ran out of it.
  bool stopping_ = false;
  int exit_code_ = 0;
};

}  // namespace sp
