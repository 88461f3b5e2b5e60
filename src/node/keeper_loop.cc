#include "node/keeper_loop.h"

#include <signal.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/no_memory.h"
#include "node/keeper_log.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr uint64_t kSignalToken = 1;
constexpr uint64_t kControlToken = 2;
constexpr int kCommandsPerTurn = 64;
constexpr Nanos kSendRetry = 10 * kNanosPerMilli;
constexpr Nanos kMemoryRetry = 10 * kNanosPerMilli;
constexpr Nanos kSignalRetry = 10 * kNanosPerMilli;
// A worker that closed its end should be ending; if it does not, it is of no use any more.
constexpr Nanos kOrphanGrace = kNanosPerSecond;

Nanos ToNanos(std::chrono::milliseconds time) { return time.count() * kNanosPerMilli; }

}  // namespace

KeeperLoop::KeeperLoop(const KeeperConfig& config, Epoll epoll, SignalFd signals, Fd listener, Fd ledger)
    : config_(config),
      epoll_(std::move(epoll)),
      signals_(std::move(signals)),
      listener_(std::move(listener)),
      ledger_(std::move(ledger)),
      extents_(config.extent_bytes, config.lock) {
  if (config.extents_at_start > 0) {
    pending_.push_back({.next = 0, .end = config.extents_at_start, .request_id = 0, .of_start = true});
  }
}

Result<int> KeeperLoop::Run() {
  SP_RETURN_IF_ERROR(epoll_.Add(signals_.fd(), EPOLLIN, kSignalToken));
  SP_RETURN_IF_ERROR(StartWorker());
  while (worker_ || !stopping_) {
    // This process holds the node's memory, so it does not end because it has none to spare.
    try {
      SP_RETURN_IF_ERROR(Turn());
    } catch (const std::bad_alloc&) {
      if (!no_memory_) KeeperLog("error", "out_of_memory", {});
      no_memory_ = true;
    }
  }
  return exit_code_;
}

Status KeeperLoop::Turn() {
  SP_ASSIGN_OR_RETURN(const auto events, epoll_.Wait(TimeoutMs()));
  // Whatever the turn before did not come to: the worker's end is told only once, the rest is done below in every turn.
  if (std::exchange(no_memory_, false)) ReapWorker();
  for (const Epoll::Event& event : events) {
    if (event.token == kSignalToken) {
      HandleSignals();
    } else {
      HandleControl();
    }
  }
  HandleTimers();
  CreateOneExtent();
  FlushOutput();
  return {};
}

int KeeperLoop::TimeoutMs() const {
  if (no_memory_) return static_cast<int>(kMemoryRetry / kNanosPerMilli);
  if (!pending_.empty() && output_.empty()) return 0;
  const Nanos next = std::min({restart_at_, kill_at_, retry_at_, signals_at_});
  if (next == kNever) return -1;
  const Nanos left = std::clamp<Nanos>(next - MonotonicNow(), 0, kNanosPerSecond);
  return static_cast<int>((left + kNanosPerMilli - 1) / kNanosPerMilli);
}

Status KeeperLoop::StartWorker() {
  restart_at_ = kNever;
  SP_ASSIGN_OR_RETURN(auto ends, UnixSocketPair());
  SpawnOptions options;
  options.executable = config_.worker_executable;
  options.argv = config_.worker_argv;
  options.fds = {{ends.second.get(), kWorkerControlFd}, {listener_.get(), kWorkerListenFd}};
  options.parent_death_signal = SIGKILL;
  SP_ASSIGN_OR_RETURN(worker_, Spawn(options));
  ++incarnation_;
  started_at_ = MonotonicNow();
  attached_ = false;
  control_ = std::move(ends.first);
  KeeperLog("info", "worker_started", {{"pid", worker_->pid}, {"incarnation", incarnation_}});
  watched_ = EPOLLIN;
  return epoll_.Add(control_.get(), watched_, kControlToken);
}

void KeeperLoop::ScheduleRestart() {
  restart_at_ = MonotonicNow() + backoff_;
  backoff_ = std::clamp(2 * backoff_, ToNanos(config_.backoff_first), ToNanos(config_.backoff_max));
}

void KeeperLoop::HandleTimers() {
  const Nanos now = MonotonicNow();
  if (now >= kill_at_) KillWorker("still running after its grace period");
  if (now >= retry_at_) retry_at_ = kNever;
  if (now >= signals_at_) WatchSignals(true);
  if (worker_ || stopping_ || now < restart_at_) return;
  const Status started = OrNoMemory("start a worker", [this] { return StartWorker(); });
  if (started.ok()) return;
  KeeperLog("error", "worker_not_started", {{"cause", started}});
  if (worker_) {
    KillWorker("cannot watch its commands");
  } else {
    ScheduleRestart();
  }
}

void KeeperLoop::HandleSignals() {
  for (;;) {
    const auto signal = signals_.Read();
    if (!signal) {
      // It stays pending, and is read later: what this process holds is worth more than a signal in time. The worker's
      // end can be seen without one.
      KeeperLog("error", "signals_unreadable", {{"cause", signal.error()}});
      ReapWorker();
      return WatchSignals(false);
    }
    if (!*signal) return;
    if ((*signal)->number == SIGCHLD) {
      ReapWorker();
    } else if ((*signal)->number == SIGHUP) {
      SignalWorker(SIGHUP);
    } else {
      BeginStop((*signal)->number == SIGTERM ? "SIGTERM" : "SIGINT");
    }
  }
}

void KeeperLoop::WatchSignals(bool watch) {
  // Not watched for a while when they cannot be read, or the loop would do nothing else.
  const uint32_t events = watch ? EPOLLIN : 0U;
  const Status changed = epoll_.Modify(signals_.fd(), events, kSignalToken);
  if (!changed.ok()) KeeperLog("error", "signals_unwatched", {{"cause", changed}});
  signals_at_ = watch && changed.ok() ? kNever : MonotonicNow() + kSignalRetry;
}

void KeeperLoop::BeginStop(std::string_view cause) {
  KeeperLog("info", "stopping", {{"cause", cause}, {"grace_ms", config_.grace.count()}});
  if (!stopping_) kill_at_ = worker_ ? MonotonicNow() + ToNanos(config_.grace) : kNever;
  stopping_ = true;
  pending_.clear();
  SignalWorker(SIGTERM);
}

void KeeperLoop::SignalWorker(int signal) {
  if (!worker_) return;
  // It is our child and not reaped yet, so the number means it and nobody else.
  const Status sent = SendSignal(worker_->pid, signal);
  if (!sent.ok()) KeeperLog("error", "signal_failed", {{"cause", sent}});
}

void KeeperLoop::KillWorker(std::string_view cause, const Status& status) {
  KeeperLog("error", "worker_killed", {{"incarnation", incarnation_}, {"cause", cause, status}});
  kill_at_ = kNever;
  SignalWorker(SIGKILL);  // First, so that the worker has no time to act on the closed connection.
  CloseControl();
}

void KeeperLoop::ReapWorker() {
  if (!worker_) return;
  const auto ended = TryWaitChild(worker_->pid);
  if (ended && !*ended) return;
  // From here its number may belong to somebody else, so nothing below may signal it.
  const pid_t pid = worker_->pid;
  worker_.reset();
  output_.clear();
  // Its last wish may have been a shutdown. Without memory to hear it the worker starts again, and wishes again.
  [[maybe_unused]] const Status heard = OrNoMemory("hear a worker's last wish", [this]() -> Status { return HandleControl(), Status(); });
  const ExitStatus status = ended ? **ended : ExitStatus{.code = -1, .signal = 0};
  char how[32];  // ExitStatus::ToString needs memory.
  const char* const name = status.signal != 0 ? ::sigabbrev_np(status.signal) : nullptr;
  if (name != nullptr) std::snprintf(how, sizeof how, "signal SIG%s", name);
  else std::snprintf(how, sizeof how, status.signal != 0 ? "signal %d" : "exit code %d", status.signal != 0 ? status.signal : status.code);
  KeeperLog(stopping_ ? "info" : "warn", "worker_ended",
            {{"pid", pid}, {"incarnation", incarnation_}, {"how", std::string_view(how)}, {"extents", extents_.size()}});
  kill_at_ = kNever;
  CloseControl();
  // What that worker wished for is forgotten with it; its successor knows nothing of it.
  std::erase_if(pending_, [](const PendingRange& range) { return !range.of_start; });
  if (stopping_) return;
  if (status.exited_with(kExitConfig)) {
    stopping_ = true;
    exit_code_ = kExitConfig;
    return;
  }
  if (MonotonicNow() - started_at_ >= ToNanos(config_.backoff_reset)) backoff_ = 0;
  ScheduleRestart();
}

void KeeperLoop::CloseControl() {
  // Closing it also ends the watch: no other descriptor refers to this end.
  control_.Reset();
  output_.clear();
  retry_at_ = kNever;
}

void KeeperLoop::HandleControl() {
  // With output waiting, the worker's next commands have to wait too: that bounds the queue, and keeps what it refers
  // to.
  for (int i = 0; i < kCommandsPerTurn && control_.valid() && output_.empty(); ++i) {
    std::array<uint8_t, kKeeperFrameBytes> buffer;
    const Result<ReceivedMessage> message = ReceiveMessage(control_.get(), buffer, 0);
    if (!message && message.error().code() == StatusCode::kUnavailable) return;
    if (!message && message.error().code() == StatusCode::kClosed) {
      kill_at_ = std::min(kill_at_, MonotonicNow() + (stopping_ ? ToNanos(config_.grace) : kOrphanGrace));
      CloseControl();
      return;
    }
    Result<KeeperFrame> frame = message ? DecodeKeeperFrame(ByteSpan(buffer).first(message->size_bytes))
                                        : std::unexpected(message.error());
    // Without the memory to answer, the worker would wait for ever: the next one begins anew.
    const Status handled = frame ? OrNoMemory("handle it", [&] { return HandleCommand(*frame); }) : frame.error();
    if (!handled.ok()) {
      KillWorker("bad command", handled);
      return;
    }
    FlushOutput();
  }
}

Status KeeperLoop::HandleCommand(const KeeperFrame& frame) {
  if (attached_ == (frame.command == KeeperCommand::kAttach)) {
    return Status(StatusCode::kProtocol, attached_ ? "attached twice" : "command before it attached");
  }
  switch (frame.command) {
    case KeeperCommand::kAttach:
      Attach(frame);
      return {};
    case KeeperCommand::kCreateExtents:
      QueueCreation(frame);
      return {};
    case KeeperCommand::kDropExtent: {
      const bool known = frame.arg0 <= std::numeric_limits<uint32_t>::max() &&
                         extents_.Drop(static_cast<uint32_t>(frame.arg0));
      Answer(frame, KeeperCommand::kDropped, known ? StatusCode::kOk : StatusCode::kNotFound);
      return {};
    }
    case KeeperCommand::kShutdown:
      BeginStop("wish of the worker");
      return {};
    default:
      return Status(StatusCode::kProtocol, "a command that only a keeper sends");
  }
}

void KeeperLoop::Attach(const KeeperFrame& frame) {
  attached_ = true;
  output_.push_back({.frame = {.command = KeeperCommand::kAttached,
                               .request_id = frame.request_id,
                               .arg0 = config_.extent_bytes,
                               .arg1 = extents_.size(),
                               .arg2 = incarnation_,
                               .arg3 = PendingExtents()},
                     .fds = {ledger_.get()}});
  for (KeeperExtents::Run& run : extents_.Runs()) {
    output_.push_back({.frame = {.command = KeeperCommand::kExtents,
                                 .request_id = frame.request_id,
                                 .arg0 = run.first_id,
                                 .arg1 = run.fds.size()},
                       .fds = std::move(run.fds)});
  }
}

StatusCode KeeperLoop::CheckCreation(uint64_t first, uint64_t count) const {
  constexpr uint64_t kIdEnd = 1ULL << 32;
  if (stopping_) return StatusCode::kUnavailable;
  if (count == 0 || first >= kIdEnd || count > kIdEnd - first) return StatusCode::kInvalidArgument;
  if (extents_.size() + PendingExtents() + count > config_.extents_max) return StatusCode::kLimit;
  const auto overlaps = [&](const PendingRange& range) { return range.next < first + count && first < range.end; };
  if (extents_.HasAnyIn(first, first + count) || std::ranges::any_of(pending_, overlaps)) {
    return StatusCode::kInvalidArgument;
  }
  return StatusCode::kOk;
}

void KeeperLoop::QueueCreation(const KeeperFrame& frame) {
  const uint64_t first = frame.arg0, count = frame.arg1;
  const StatusCode checked = CheckCreation(first, count);
  if (checked == StatusCode::kOk) {
    pending_.push_back({.next = first, .end = first + count, .request_id = frame.request_id, .of_start = false});
    return;
  }
  KeeperLog("warn", "create_refused", {{"first_id", first}, {"count", count}, {"code", StatusCodeName(checked)}});
  Answer(frame, KeeperCommand::kCreateFailed, checked);
}

uint64_t KeeperLoop::PendingExtents() const {
  uint64_t count = 0;
  for (const PendingRange& range : pending_) count += range.end - range.next;
  return count;
}

void KeeperLoop::Answer(const KeeperFrame& question, KeeperCommand command, StatusCode code) {
  output_.push_back({.frame = {.command = command,
                               .request_id = question.request_id,
                               .arg0 = question.arg0,
                               .arg1 = question.arg1,
                               .status_code = static_cast<uint32_t>(code)},
                     .fds = {}});
}

void KeeperLoop::CreateOneExtent() {
  if (pending_.empty() || !output_.empty()) return;
  PendingRange& range = pending_.front();
  const auto id = static_cast<uint32_t>(range.next);
  std::vector<int> fds;
  fds.reserve(1);  // Before the extent exists: what comes after that must happen.
  const Status created = OrNoMemory("create an extent", [&] { return extents_.Create(id); });
  KeeperFrame news{.command = KeeperCommand::kExtentCreated, .request_id = range.request_id, .arg0 = id, .arg1 = 1};
  if (created.ok()) {
    ++range.next;
    fds.push_back(extents_.fd(id));
  } else {
    news.command = KeeperCommand::kCreateFailed;
    news.arg1 = range.end - range.next;
    news.status_code = static_cast<uint32_t>(created.code());
    KeeperLog("error", "create_failed", {{"first_id", id}, {"count", news.arg1}, {"cause", created}});
    range.next = range.end;
    if (range.of_start && config_.lock == LockMemory::kRequired) {
      exit_code_ = kExitConfig;
      BeginStop("the settings require locked memory");
      return;
    }
  }
  if (range.next == range.end) {
    if (range.of_start) KeeperLog("info", "pool_made", {{"extents", extents_.size()}});
    pending_.pop_front();
  }
  // A worker that attaches later gets the extent then.
  if (!attached_ || !control_.valid()) return;
  const Status told = OrNoMemory("tell of an extent", [&]() -> Status { return output_.push_back({.frame = news, .fds = std::move(fds)}), Status(); });
  if (!told.ok()) KillWorker("cannot tell it of extents", told);  // The next one asks what there is.
}

void KeeperLoop::FlushOutput() {
  if (!control_.valid() || retry_at_ != kNever) return;
  uint32_t wanted = EPOLLIN;
  while (!output_.empty()) {
    const Status sent = SendMessage(control_.get(), EncodeKeeperFrame(output_.front().frame), output_.front().fds);
    if (sent.code() == StatusCode::kUnavailable) {
      wanted = EPOLLOUT;
      break;
    }
    if (sent.code() == StatusCode::kLimit) {
      // Too many descriptors under way, of all sockets of this user: no event tells when that changes.
      wanted = 0;
      retry_at_ = MonotonicNow() + kSendRetry;
      break;
    }
    if (sent.code() == StatusCode::kClosed) {
      // The worker is ending. One that does not has missed what was for it, and is of no use any more.
      output_.clear();
      kill_at_ = std::min(kill_at_, MonotonicNow() + (stopping_ ? ToNanos(config_.grace) : kOrphanGrace));
      break;
    }
    if (!sent.ok()) return KillWorker("cannot answer it", sent);
    output_.pop_front();
  }
  if (wanted == watched_) return;
  const Status changed = epoll_.Modify(control_.get(), wanted, kControlToken);
  if (!changed.ok()) return KillWorker("cannot watch it", changed);
  watched_ = wanted;
}

}  // namespace sp
