#include "node/node_core.h"

#include <algorithm>

#include "base/plant.h"
#include "base/sha256.h"
#include "node/node_core_impl.h"

namespace sp {

Hash256 MarkerOf(uint32_t uid, const std::string& ns) {
  const std::string head = "safepoint marker v1 " + std::to_string(uid) + " ";
  return Sha256({AsBytes(head), AsBytes(ns)});
}

std::string StepText(const AttemptKey& key) {
  return "step " + std::to_string(key.step) + " (generation " + std::to_string(key.generation) + ", try " + std::to_string(key.try_number) + ")";
}

std::string HeaderTooLarge(uint64_t header_bytes, uint64_t header_max) {
  return "a shard's header of " + std::to_string(header_bytes) + " bytes is more than the " + std::to_string(header_max) +
         " bytes that the daemon's setting header_max allows: save fewer tensors per rank, or have header_max raised";
}

NodeCore::NodeCore(CoreConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
NodeCore::~NodeCore() = default;
NodeCore::NodeCore(NodeCore&&) noexcept = default;
std::vector<Action> NodeCore::Restore(Nanos now, const Ledger::Contents& contents, const std::vector<uint32_t>& extents) {
  return impl_->Restore(now, contents, extents);
}
std::vector<Action> NodeCore::Step(Nanos now, const Event& event) { return impl_->Step(now, event); }
std::optional<Nanos> NodeCore::NextDeadline() const { return impl_->NextDeadline(); }
std::vector<LedgerEntry> NodeCore::Snapshot() const { return impl_->Snapshot(); }
bool NodeCore::IsDraining() const { return impl_->IsDraining(); }
Status NodeCore::CheckInvariants() const { return impl_->CheckInvariants(); }
std::string NodeCore::StatusJson(Nanos now, uint32_t uid, bool all_uids) const { return impl_->StatusJson(now, uid, all_uids); }

NodeCore::Impl::Impl(CoreConfig config)
    : config_(std::move(config)), catalog_(0, config_.structures_max), pool_(config_.extent_bytes, config_.extents_max), markers_(config_.markers.begin(), config_.markers.end()) {}

std::vector<Action> NodeCore::Impl::Step(Nanos now, const Event& event) {
  now_ = now;
  actions_.clear();
  dropped_.clear();
  std::visit([this](const auto& e) { On(e); }, event);
  if (stopping_) EndIfDrained();
  if (trim_) catalog_.Trim();
  trim_ = false;
  if (SP_PLANTED(ack_before_ledger)) {
    std::stable_partition(actions_.begin(), actions_.end(), [](const Action& a) { return !std::holds_alternative<action::Append>(a); });
  }
  return std::move(actions_);
}

void NodeCore::Impl::Log(action::Log::Severity severity, std::string name, std::vector<std::pair<std::string, std::string>> fields) {
  actions_.push_back(action::Log{severity, std::move(name), std::move(fields)});
}

void NodeCore::Impl::Evidence(action::Log::Severity severity, std::string name, const AttemptKey& key, Fields more) {
  Fields fields = {{"namespace", key.ns}, {"uid", std::to_string(key.uid)}, {"generation", std::to_string(key.generation)},
                   {"step", std::to_string(key.step)}, {"attempt", key.AttemptId().ToHex()}};
  fields.insert(fields.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
  actions_.push_back(action::Log{severity, std::move(name), std::move(fields), true});
}

void NodeCore::Impl::SendError(ConnectionId c, MessageType type, uint64_t request_id, const Status& status) {
  Send(c, Frame::Error(type, request_id, status));
}

void NodeCore::Impl::On(const event::Received& e) {
  auto it = connections_.find(e.connection);
  if (it == connections_.end()) return;
  const Frame& f = e.frame;
  Status status;
  if (f.type != MessageType::kHello && !SessionOf(e.connection)) {
    status = Status(StatusCode::kProtocol, "the first message must be Hello");
  } else if (f.status != StatusCode::kOk) {
    status = Status(StatusCode::kProtocol, "a request with an error status");
  } else {
    switch (f.type) {
      case MessageType::kHello: status = Hello(e.connection, f); break;
      case MessageType::kOpenGeneration: status = OpenGeneration(e.connection, f); break;
      case MessageType::kPrepareSlots: status = PrepareSlots(e.connection, f); break;
      case MessageType::kReserve: status = Reserve(e.connection, f); break;
      case MessageType::kFetchExtents: status = FetchExtents(e.connection, f); break;
      case MessageType::kSeal: status = Seal(e.connection, f); break;
      case MessageType::kAbort: status = Abort(e.connection, f); break;
      case MessageType::kRenew: status = Renew(e.connection, f); break;
      case MessageType::kWait: status = Wait(e.connection, f); break;
      case MessageType::kLatest: status = Latest(e.connection, f); break;
      case MessageType::kListSteps: status = ListSteps(e.connection, f); break;
      case MessageType::kListNamespaces: status = ListNamespaces(e.connection, f); break;
      case MessageType::kOpenRead: status = OpenRead(e.connection, f); break;
      case MessageType::kShardInfo: status = ShardInfo(e.connection, f); break;
      case MessageType::kUnpin: status = Unpin(e.connection, f); break;
      case MessageType::kPinStep: status = PinStep(e.connection, f); break;
      case MessageType::kReportCorrupt: status = ReportCorrupt(e.connection, f); break;
      case MessageType::kStatus: status = StatusOf(e.connection, f); break;
      case MessageType::kBye: status = Bye(e.connection, f); break;
      case MessageType::kMakeDurable: status = MakeDurable(e.connection, f); break;
    }
  }
  if (status.ok()) return;
  ++counters_.refused;
  SendError(e.connection, f.type, f.request_id, status);
  // Who does not speak the protocol gets no second chance on this connection.
  if (status.code() == StatusCode::kProtocol) actions_.push_back(action::Close{e.connection});
}

std::optional<Nanos> NodeCore::Impl::NextDeadline() const {
  std::optional<Nanos> next;
  const auto consider = [&](Nanos t) { next = next ? std::min(*next, t) : t; };
  for (const auto& [id, c] : connections_) {
    if (!c.session) consider(c.connected_at + config_.handshake_ns);
  }
  for (const auto& [id, lease] : leases_) consider(lease.expires);
  for (const auto& [id, pin] : pins_) consider(pin.expires);
  for (const auto& [key, group] : groups_) consider(group.expires);
  for (const auto& [id, build] : builds_) consider(build.deadline);
  for (const Waiter& w : waiters_) consider(w.deadline);
  for (const auto& [id, drain] : drains_) {
    if (drain.retry_at != 0) consider(drain.retry_at);  // Once looked at, it waits for its turn, which comes when another one ends.
  }
  for (const auto& [ns, retention] : retentions_) {
    if (retention.wanted && !retaining_ && !stopping_) consider(retention.retry_at);
  }
  for (const Unanswered& u : unanswered_) consider(u.deadline);
  for (const auto& [id, session] : sessions_) {
    if (auto t = SilenceEnds(id, session)) consider(*t);
  }
  if (config_.idle_exit_ns > 0 && connections_.empty() && drains_.empty() && !exit_asked_) {
    const bool holding = pool_.totals().sealed > 0;
    const Nanos idle = holding ? config_.idle_exit_holding_ns : config_.idle_exit_ns;
    if (idle > 0) consider(busy_at_ + idle);
  }
  return next;
}

void NodeCore::Impl::On(const event::Tick&) {
  std::vector<ConnectionId> silent;
  for (const auto& [id, c] : connections_) {
    if (!c.session && c.connected_at + config_.handshake_ns <= now_) silent.push_back(id);
  }
  for (ConnectionId id : silent) {
    Log(action::Log::Severity::kWarning, "handshake_timeout", {{"connection", std::to_string(id)}});
    actions_.push_back(action::Close{id});
    On(event::Disconnected{id});
  }
  std::vector<uint64_t> expired;
  for (const auto& [id, lease] : leases_) {
    if (lease.expires <= now_) expired.push_back(id);
  }
  for (uint64_t id : expired) {
    auto it = leases_.find(id);
    if (it == leases_.end()) continue;  // Went with another one's attempt.
    const ledger::Lease entry = it->second.entry;
    const Id128 attempt = it->second.attempt;
    EndLease(id, IsAlive(it->second.session) && !SP_PLANTED(zombie_reused));
    if (auto z = zombies_.find(id); z != zombies_.end()) z->second.expired = true;
    CloseAttempt({entry.key.uid, entry.key.ns}, attempt,
                 "rank " + std::to_string(entry.rank) + ": its lease expired after " + std::to_string(config_.lease_ns / kNanosPerSecond) +
                     " s without a seal");
  }
  std::vector<uint64_t> late;
  for (const auto& [id, build] : builds_) {
    if (build.deadline <= now_) late.push_back(id);
  }
  for (uint64_t id : late) CancelBuild(id, Status(StatusCode::kDeadline, "the extents were not ready in time"));
  std::vector<uint64_t> unpinned;
  for (const auto& [id, pin] : pins_) {
    if (pin.expires <= now_) unpinned.push_back(id);
  }
  for (uint64_t id : unpinned) DropPin(id);
  std::set<NamespaceKey> touched;
  for (auto it = groups_.begin(); it != groups_.end();) {
    if (it->second.expires <= now_) {
      touched.insert(std::get<0>(it->first));
      it = groups_.erase(it);
    } else {
      ++it;
    }
  }
  for (const NamespaceKey& ns : touched) RetireOld(ns);
  for (size_t i = 0; i < waiters_.size();) {
    if (waiters_[i].deadline <= now_) {
      const Waiter w = waiters_[i];
      waiters_.erase(waiters_.begin() + static_cast<ptrdiff_t>(i));
      const Attempt* attempt = catalog_.FindAttempt(w.ns, w.request.attempt);
      SendError(w.connection, MessageType::kWait, w.request_id,
                Status(StatusCode::kDeadline, attempt ? StepText(attempt->key) + ": " + std::to_string(attempt->records.size()) + " of " +
                                                            std::to_string(attempt->world_size) + " ranks sealed by the deadline"
                                                      : "the attempt was not known by the deadline"));
    } else {
      ++i;
    }
  }
  PumpDrains();
  PumpRetention();
  AnswerLate();
  std::vector<Id128> gone;  // Nobody can tell us that these died: when they hold nothing they need any more, drop what they have.
  for (const auto& [id, session] : sessions_) {
    if (auto t = SilenceEnds(id, session); t && *t <= now_) gone.push_back(id);
  }
  for (const Id128& id : gone) EndSessionUse(id, true);
  if (config_.idle_exit_ns > 0 && connections_.empty() && drains_.empty() && !exit_asked_) {
    const bool holding = pool_.totals().sealed > 0;
    const Nanos idle = holding ? config_.idle_exit_holding_ns : config_.idle_exit_ns;
    if (idle > 0 && busy_at_ + idle <= now_) {
      // From here nothing is promised any more: whoever connects now finds the next daemon.
      stopping_ = exit_asked_ = true;
      actions_.push_back(action::ExitDaemon{holding ? "idle, holding steps that nobody asked for" : "idle, holding nothing"});
    }
  }
}

void NodeCore::Impl::On(const event::Shutdown&) {
  if (stopping_) return;
  stopping_ = true;
  const Status why(StatusCode::kUnavailable, "the daemon is stopping");
  for (const Waiter& w : waiters_) SendError(w.connection, MessageType::kWait, w.request_id, why);
  waiters_.clear();
  for (const Unanswered& u : unanswered_) SendError(u.connection, u.frame.type, u.frame.request_id, why);
  unanswered_.clear();
  while (!builds_.empty()) CancelBuild(builds_.begin()->first, why);
  Log(action::Log::Severity::kInfo, "stopping",
      {{"open_leases", std::to_string(leases_.size())}, {"steps_to_store", std::to_string(drains_.size())}});
}

}  // namespace sp
