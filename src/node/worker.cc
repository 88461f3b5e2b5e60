#include "node/worker.h"

#include <signal.h>
#include <sysexits.h>
#include <unistd.h>

#include <algorithm>

#include "durable/store_url.h"
#include "node/keeper.h"
#include "node/listen_address.h"
#include "node/state_dir.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr Nanos kAttachTimeout = 60 * kNanosPerSecond;
constexpr Nanos kBeat = 500 * kNanosPerMilli;      // The loop turns at least so often, which is what /healthz looks at.
constexpr Nanos kPublishEvery = kNanosPerSecond;
constexpr Nanos kHttpRetry = 5 * kNanosPerSecond;
constexpr Nanos kDescriptorRetry = 10 * kNanosPerMilli;
constexpr size_t kExecutorQueue = 16384;           // Every lease may be waiting to be checked, and every shard to be read.
constexpr uint64_t kOtherFds = 512;                // Beside extents and connections: HTTP, re-opened extents of one frame, and the like.

LogFields Cause(const Status& status) { return {{"cause", status.ToString()}}; }

}  // namespace

int RunWorker(const CommandLine& command) { return Worker(command).Run(); }

Worker::Worker(const CommandLine& command)
    : settings_(command.settings), node_(command.node), boot_(command.boot), started_at_(clock_.Now()),
      logger_(settings_.log_level, settings_.log_lines_per_uid), board_(clock_), exit_code_(EX_SOFTWARE) {}

Worker::~Worker() = default;

int Worker::Run() {
  const Status started = Start();
  if (!started.ok()) {
    logger_.Log(LogSeverity::kError, "worker_not_started", Cause(started));
    return exit_code_;
  }
  const auto code = Loop();
  if (!code) logger_.Log(LogSeverity::kError, "worker_failed", Cause(code.error()));
  return code.value_or(exit_code_);
}

// A crash anywhere in here leaves the ledger and the extents as they were; the next worker does the same again (F17).
Status Worker::Start() {
  // Its log may go to a pipe whose reader dies.
  SP_RETURN_IF_ERROR(BlockSignals(std::vector<int>{SIGPIPE}));
  SP_ASSIGN_OR_RETURN(signals_, SignalFd::Create(std::vector<int>{SIGTERM, SIGINT, SIGHUP}));  // Before any thread starts.
  SP_ASSIGN_OR_RETURN(epoll_, Epoll::Create());
  listener_ = Fd(kWorkerListenFd);
  keeper_.emplace(Fd(kWorkerControlFd));
  SP_ASSIGN_OR_RETURN(KeeperAttachment attached, keeper_->Attach(clock_.Now() + kAttachTimeout));
  incarnation_ = attached.incarnation;
  const Status descriptors = EnsureFdLimit(settings_.extents_max() + 2ull * settings_.connections_max + kOtherFds);
  if (!descriptors.ok()) return Refuse(Status(descriptors.code(), "settings connections_max and pool need more descriptors: " + descriptors.message()));
  if (attached.extent_bytes != settings_.extent_bytes) return Status(StatusCode::kInternal, "keeper and worker differ in the size of extents");

  std::vector<uint32_t> extents;
  for (KeptExtent& extent : attached.extents) {
    extents.push_back(extent.id);
    extents_[extent.id] = std::make_shared<const Fd>(std::move(extent.fd));
  }
  // The keeper makes them in ascending order, so those that are still to come are the last ones of the start.
  const uint32_t at_start = static_cast<uint32_t>(settings_.pool_prefault_bytes / settings_.extent_bytes);
  const uint32_t to_come = static_cast<uint32_t>(std::min<uint64_t>(attached.extents_to_come, at_start));
  for (uint32_t id = at_start - to_come; id < at_start; ++id) coming_.insert(id);

  Result<LedgerKeeping> ledger = LedgerKeeping::Open(attached.ledger.get(), settings_.ledger_bytes);
  if (!ledger) return Refuse(ledger.error());
  ledger_ = std::move(*ledger);
  const Ledger::Contents contents = ledger_->Read();
  counters_.ledger_damaged_entries = contents.damaged_entries;
  if (contents.damaged_entries > 0) {
    logger_.Log(LogSeverity::kError, "ledger_damaged", {{"entries", std::to_string(contents.damaged_entries)}});
  }
  SP_ASSIGN_OR_RETURN(executor_, Executor::Create(settings_.check_threads, kExecutorQueue));

  std::string store_url;
  const RetentionRule rule{settings_.durable_keep_last, settings_.durable_keep_every, settings_.durable_keep_for / kNanosPerSecond};
  if (settings_.store != "off") {
    SP_ASSIGN_OR_RETURN(store_url, ResolveStoreUrl(settings_.store));
    const auto post = [this](Event event) { Post(std::move(event)); };
    SP_ASSIGN_OR_RETURN(drainer_, Drainer::Create(store_url, settings_.drain_threads, settings_.drain_rate, rule, clock_, post));
    drainer_->SweepIfDue();
  }

  CoreConfig config;
  config.node = node_;
  config.boot = boot_;
  config.incarnation = incarnation_;
  config.version = VersionText();
  config.daemon_pid = static_cast<uint32_t>(getppid());  // The keeper is what lives as long as the daemon.
  config.is_private = settings_.is_private;
  config.extent_bytes = settings_.extent_bytes;
  config.extents_max = settings_.extents_max();
  config.retain = settings_.retain;
  config.retain_every = settings_.retain_every;
  config.retain_for = settings_.retain_for;
  config.retain_max = settings_.retain_max;
  config.lease_ns = settings_.lease;
  config.pin_ns = settings_.pin;
  config.handshake_ns = settings_.handshake;
  config.idle_exit_ns = settings_.idle_exit;
  config.idle_exit_holding_ns = settings_.idle_exit_holding;
  config.connections_max = settings_.connections_max;
  config.connections_per_uid_max = settings_.connections_per_uid_max;
  config.open_attempts_max = settings_.open_attempts_max;
  config.pins_max = settings_.pins_max;
  config.namespaces_per_uid_max = settings_.namespaces_per_uid_max;
  config.header_max = settings_.header_max;
  config.store = store_url;
  config.durable_every = settings_.durable_every;
  config.durable_interval = settings_.durable_interval;
  config.drains_max = settings_.drain_threads;
  if (rule.Deletes()) config.durable_keeps = std::max<uint64_t>(rule.keep_last, 1);
  config.structures_max = std::max(config.structures_max, 2 * settings_.header_max);
  auto markers = LoadMarkers(settings_.state_dir);
  config.markers_known = markers.has_value();
  if (markers) config.markers = std::move(*markers);
  else logger_.Log(LogSeverity::kWarning, "markers_unknown", Cause(markers.error()));
  core_ = std::make_unique<NodeCore>(std::move(config));

  SP_RETURN_IF_ERROR(epoll_->Add(keeper_->fd(), EPOLLIN, Token(Source::kKeeper)));
  SP_RETURN_IF_ERROR(epoll_->Add(signals_->fd(), EPOLLIN, Token(Source::kSignals)));
  SP_RETURN_IF_ERROR(epoll_->Add(executor_->fd(), EPOLLIN, Token(Source::kExecutor)));
  if (drainer_) SP_RETURN_IF_ERROR(epoll_->Add(drainer_->fd(), EPOLLIN, Token(Source::kDrainer)));
  const Status http = StartHttp();
  if (!http.ok()) {
    if (incarnation_ == 1) return Refuse(Status(http.code(), "setting http = \"" + settings_.http + "\": " + http.message()));
    logger_.Log(LogSeverity::kError, "http_not_started", Cause(http));  // The steps matter more; HandleTimers tries again.
  }
  ledger_->BeginStep();
  SP_RETURN_IF_ERROR(CarryOut(core_->Restore(clock_.Now(), contents, extents)));
  SP_RETURN_IF_ERROR(Pump());
  SP_RETURN_IF_ERROR(epoll_->Add(listener_.get(), EPOLLIN, Token(Source::kListener)));
  listening_ = true;
  logger_.Log(LogSeverity::kInfo, "worker_serving",
              {{"pid", std::to_string(getpid())}, {"incarnation", std::to_string(incarnation_)}, {"socket", settings_.socket},
               {"extents", std::to_string(extents_.size())}, {"extents_to_come", std::to_string(coming_.size())},
               {"ledger_entries", std::to_string(contents.entries.size())}, {"http", http_ ? std::to_string(http_->port()) : "off"}});
  return {};
}

// Starting again cannot help. Only the first worker may end the keeper with that: later, its memory may hold steps, which a restart of the daemon
// by somebody who has read the log can still be avoided for.
Status Worker::Refuse(const Status& why) {
  if (incarnation_ == 1) exit_code_ = kExitConfig;
  return why;
}

Status Worker::StartHttp() {
  if (settings_.http == "off" || http_) return {};
  http_again_at_ = clock_.Now() + kHttpRetry;
  SP_ASSIGN_OR_RETURN(const ListenAddress address, ParseListenAddress(settings_.http));
  board_.Beat();
  SP_ASSIGN_OR_RETURN(http_, HttpServer::Start(address.host, address.port,
                                               {{"/healthz", [this] { return board_.HealthPage(); }},
                                                {"/metrics", [this] { return board_.MetricsPage(); }},
                                                {"/status", [this] { return board_.StatusPage(); }}}));
  return {};
}

int Worker::TimeoutMs(Nanos now) const {
  Nanos until = now + kBeat;
  // A deadline that stays in the past after its Tick must not make the loop spin.
  if (const auto next = core_->NextDeadline()) until = std::min(until, std::max(*next, ticked_at_ + kNanosPerMilli));
  if (accept_again_at_ != 0) until = std::min(until, accept_again_at_);
  for (const auto& [id, connection] : connections_) {
    if (connection.must_retry()) until = std::min(until, now + kDescriptorRetry);
    if (connection.closing_by != 0) until = std::min(until, connection.closing_by);
  }
  if (stopping_) until = std::min(until, stop_by_);
  return static_cast<int>((std::max<Nanos>(until - now, 0) + kNanosPerMilli - 1) / kNanosPerMilli);
}

Result<int> Worker::Loop() {
  for (;;) {
    Nanos now = clock_.Now();
    board_.Beat();
    PublishStatus(now);
    if (StopIsDue(now)) {
      if (keeper_ends_ && core_->IsDraining()) {
        logger_.Log(LogSeverity::kError, "stopped_undrained", {{"why", "grace was too short for what was asked to be durable; raise it"}});
      }
      return 0;
    }
    SP_ASSIGN_OR_RETURN(const auto ready, epoll_->Wait(TimeoutMs(now)));
    for (const Epoll::Event& event : ready) {
      const uint64_t id = event.token & ((uint64_t{1} << 56) - 1);
      switch (static_cast<Source>(event.token >> 56)) {
        case Source::kListener: Accept(); break;
        case Source::kKeeper: SP_RETURN_IF_ERROR(HandleKeeper()); break;
        case Source::kSignals: SP_RETURN_IF_ERROR(HandleSignals()); break;
        case Source::kExecutor: executor_->RunCompletions(); break;
        case Source::kDrainer: drainer_->RunCompletions(); break;
        case Source::kConnection:
          if (event.events & EPOLLOUT) FlushConnection(id);
          if (event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) ReadFrames(id);
          break;
        case Source::kSession:
          if (const auto it = watched_.find(id); it != watched_.end()) {
            const Id128 session = it->second.session;
            SP_RETURN_IF_ERROR(Do(action::UnwatchSession{session}));
            Post(event::SessionDied{session});
          }
          break;
      }
      SP_RETURN_IF_ERROR(Pump());
    }
    now = clock_.Now();
    HandleTimers(now);
    SP_RETURN_IF_ERROR(Pump());
  }
}

void Worker::HandleTimers(Nanos now) {
  if (const auto next = core_->NextDeadline(); next && *next <= now && now >= ticked_at_ + kNanosPerMilli) {
    ticked_at_ = now;
    Post(event::Tick{});
  }
  if (drainer_ && now >= drains_seen_at_ + kBeat) {
    drains_seen_at_ = now;
    drainer_->PostProgress();
  }
  if (accept_again_at_ != 0 && now >= accept_again_at_) {
    accept_again_at_ = 0;
    if (!stopping_ && !listening_) listening_ = epoll_->Add(listener_.get(), EPOLLIN, Token(Source::kListener)).ok();
    if (!stopping_ && !listening_) accept_again_at_ = now + kBeat;
  }
  std::vector<ConnectionId> flush, close;
  for (const auto& [id, connection] : connections_) {
    if (connection.must_retry()) flush.push_back(id);
    if (connection.closing_by != 0 && now >= connection.closing_by) close.push_back(id);
  }
  for (const ConnectionId id : flush) FlushConnection(id);
  for (const ConnectionId id : close) {
    if (const auto it = connections_.find(id); it != connections_.end()) Forget(it);
  }
  if (!http_ && settings_.http != "off" && now >= http_again_at_ && !stopping_) {
    const Status started = StartHttp();
    if (started.ok()) logger_.Log(LogSeverity::kInfo, "http_started", {{"port", std::to_string(http_->port())}});
  }
}

Status Worker::HandleSignals() {
  for (;;) {
    SP_ASSIGN_OR_RETURN(const auto signal, signals_->Read());
    if (!signal) return {};
    // SIGINT comes to the whole foreground group; the keeper answers it with a SIGTERM for us. There is nothing to reload for SIGHUP.
    if (signal->number == SIGTERM) BeginStop(signal->sender == getppid());
  }
}

// The keeper's SIGTERM ends the daemon; anybody else's ends this worker only, and the keeper starts the next one: killing a worker must never
// cost the steps that the keeper holds.
void Worker::BeginStop(bool keeper_ends) {
  if (keeper_ends) {
    keeper_ends_ = true;
    Post(event::Shutdown{});
  }
  if (stopping_) return;
  logger_.Log(LogSeverity::kInfo, "worker_stopping", {{"whole_daemon", keeper_ends ? "true" : "false"}});
  stopping_ = true;
  // Replies take half of the grace at most. What was asked to be durable may take nearly all of it: the keeper kills at its end.
  const bool drains = keeper_ends && core_->IsDraining();
  stop_by_ = clock_.Now() + (drains ? settings_.grace - settings_.grace / 10 : settings_.grace / 2);
  if (listening_ && !epoll_->Remove(listener_.get()).ok()) accept_again_at_ = 0;
  listening_ = false;
}

bool Worker::StopIsDue(Nanos now) const {
  if (!stopping_) return false;
  if (keeper_ends_ && core_->IsDraining() && now < stop_by_) return false;
  return now >= stop_by_ || std::none_of(connections_.begin(), connections_.end(), [](const auto& c) { return c.second.has_queued(); });
}

void Worker::PublishStatus(Nanos now) {
  if (!http_ || (published_at_ != 0 && now < published_at_ + kPublishEvery)) return;
  published_at_ = now;
  counters_.incarnation = incarnation_;
  counters_.uptime_seconds = static_cast<uint64_t>((now - started_at_) / kNanosPerSecond);
  counters_.extents_held = extents_.size();
  counters_.extents_to_come = coming_.size();
  counters_.ledger_bytes = ledger_->used_bytes();
  counters_.ledger_bytes_max = ledger_->area_bytes();
  counters_.ledger_compactions = ledger_->compactions();
  const std::string core = core_->StatusJson(now, 0, true);
  board_.Publish(RenderStatus(core, counters_), RenderMetrics(core, counters_));
}

}  // namespace sp
