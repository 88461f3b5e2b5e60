// The worker: turns sockets, timers, the keeper's messages and the executor's results into events of NodeCore, and carries out its actions.
//
// Order is what makes it safe. Actions are carried out in the order in which the core gave them, so a ledger entry is in the keeper's memory
// before the reply that depends on it leaves. A SIGKILL between any two actions loses at most replies, and clients repeat their requests.
// Events that come up while actions are carried out wait in a queue; Step is never entered twice.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>

#include "http/http_server.h"
#include "node/client_connection.h"
#include "node/command_line.h"
#include "node/drainer.h"
#include "node/executor.h"
#include "node/keeper_link.h"
#include "node/ledger_keeping.h"
#include "node/logging.h"
#include "node/metrics.h"
#include "node/node_core.h"
#include "os/epoll.h"
#include "os/signals.h"

namespace sp {

// Runs in the child that the keeper started; needs its descriptors (keeper_protocol.h). The exit code of the process.
int RunWorker(const CommandLine& command);

// Owned by the thread that runs it.
class Worker {
 public:
  explicit Worker(const CommandLine& command);
  ~Worker();

  // Attaches to the keeper, reads the ledger, serves until it is told to stop.
  int Run();

 private:
  enum class Source : uint64_t { kListener = 1, kKeeper, kSignals, kExecutor, kConnection, kSession, kDrainer };
  struct WatchedSession {
    Id128 session;
    Fd pidfd;
  };
  using ConnectionMap = std::map<ConnectionId, ClientConnection>;

  // --- start and loop (worker.cc)
  Status Start();
  Status StartHttp();
  Status Refuse(const Status& why);
  Result<int> Loop();
  int TimeoutMs(Nanos now) const;
  void HandleTimers(Nanos now);
  Status HandleSignals();
  void BeginStop(bool keeper_ends);
  bool StopIsDue(Nanos now) const;
  void PublishStatus(Nanos now);

  // --- sockets (worker_sockets.cc)
  void Accept();
  void PauseAccepting(const Status& why);
  void ReadFrames(ConnectionId id);
  void RefuseFrame(ConnectionId id, const Status& why);
  void SendTo(ConnectionId id, OutgoingFrame frame);
  void FlushConnection(ConnectionId id);
  void CloseAfterFlush(ConnectionId id);
  void DropConnection(ConnectionId id, const std::string& why);
  void Forget(ConnectionMap::iterator it);
  void WatchForOutput(ConnectionId id, ClientConnection& connection);
  Status HandleKeeper();

  // --- the core (worker_actions.cc)
  void Post(Event event) { events_.push_back(std::move(event)); }
  Status Pump();
  Status CarryOut(std::vector<Action> actions);
  Status Do(const action::Append& a);
  Status Do(const action::Send& a);
  Status Do(const action::Close& a);
  Status Do(const action::WatchSession& a);
  Status Do(const action::UnwatchSession& a);
  Status Do(const action::CheckSeal& a);
  Status Do(const action::ReadStructure& a);
  Status Do(const action::CheckBlock& a);
  Status Do(const action::StoreShard& a);
  Status Do(const action::StoreManifest& a);
  Status Do(const action::ListStore& a);
  Status Do(const action::PlanRetention& a);
  Status Do(const action::DeleteSteps& a);
  Status Do(const action::CreateExtents& a);
  Status Do(const action::DropExtents& a);
  Status Do(const action::WriteMarker& a);
  Status Do(const action::Log& a);
  Status Do(const action::ExitDaemon& a);
  Result<ExtentSet> ExtentsOf(const std::vector<uint32_t>& ids) const;
  // Runs `check(lease)` on the executor and posts its event; `failed(status)` when it cannot be run.
  template <typename Check, typename Failed>
  void RunCheck(const std::vector<uint32_t>& extents, Check check, Failed failed, bool large = false);
  void WatchPidfd(const Id128& session, Fd pidfd);

  static uint64_t Token(Source source, uint64_t id = 0) { return static_cast<uint64_t>(source) << 56 | id; }

  const Settings settings_;
  const Id128 node_, boot_;
  const SteadyClock clock_;
  const Nanos started_at_;
  Logger logger_;
  StatusBoard board_;
  int exit_code_;  // When an error ends the worker.

  std::optional<Epoll> epoll_;
  std::optional<SignalFd> signals_;
  Fd listener_;
  bool listening_ = false;
  Nanos accept_again_at_ = 0;
  std::optional<KeeperLink> keeper_;
  uint64_t incarnation_ = 0;
  std::map<uint32_t, SharedFd> extents_;
  std::set<uint32_t> coming_;  // Extents that the keeper makes at its start and that are not here yet.
  std::optional<LedgerKeeping> ledger_;
  std::unique_ptr<NodeCore> core_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Drainer> drainer_;  // Where there is a store.
  std::deque<Event> events_;

  ConnectionMap connections_;
  ConnectionId last_connection_ = 0;
  std::map<uint64_t, WatchedSession> watched_;
  std::map<Id128, uint64_t> watch_of_;
  uint64_t last_watch_ = 0;
  std::optional<uint32_t> cause_uid_;  // Whose request the core is working on, for the budget of log lines.

  Status failed_;  // Of a step whose actions could not be carried out: the worker must end.
  WorkerCounters counters_;
  Nanos ticked_at_ = 0, published_at_ = 0, drains_seen_at_ = 0, http_again_at_ = 0, marker_warned_at_ = 0;
  bool stopping_ = false, keeper_ends_ = false;
  Nanos stop_by_ = 0;
  std::unique_ptr<HttpServer> http_;  // Last: its thread reads the board, so it goes first.
};

}  // namespace sp
