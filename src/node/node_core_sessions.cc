// Connections and sessions: who talks to us, and what ends with them.
#include <algorithm>

#include "format/names.h"
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
// A start time of 0 could not be read; the id of the session, which only its process knows, has to do then.
bool SameProcess(const SessionKey& a, const SessionKey& b) {
  return a.uid == b.uid && a.pid == b.pid && (a.start_time == b.start_time || a.start_time == 0 || b.start_time == 0);
}
}  // namespace

void NodeCore::Impl::On(const event::Connected& e) {
  busy_at_ = now_;
  const auto of_uid = std::count_if(connections_.begin(), connections_.end(), [&](const auto& c) { return c.second.uid == e.uid; });
  if (connections_.size() >= config_.connections_max || static_cast<uint32_t>(of_uid) >= config_.connections_per_uid_max) {
    SendError(e.connection, MessageType::kHello, 0,
              Status(StatusCode::kLimit, "too many connections: " + std::to_string(of_uid) + " of uid " + std::to_string(e.uid)));
    actions_.push_back(action::Close{e.connection});
    return;
  }
  connections_[e.connection] = Connection{e.uid, e.pid, e.start_time, std::nullopt, now_};
}

void NodeCore::Impl::On(const event::Disconnected& e) {
  auto it = connections_.find(e.connection);
  if (it == connections_.end()) return;
  busy_at_ = now_;
  const std::optional<Id128> session = it->second.session;
  connections_.erase(it);
  std::erase_if(waiters_, [&](const Waiter& w) { return w.connection == e.connection; });
  std::vector<uint64_t> builds;
  for (const auto& [id, build] : builds_) {
    if (build.connection == e.connection) builds.push_back(id);
  }
  for (uint64_t id : builds) CancelBuild(id, Status(StatusCode::kClosed, "the connection is gone"));
  if (!session) return;
  if (auto s = sessions_.find(*session); s != sessions_.end()) {
    s->second.connections.erase(e.connection);
    s->second.silent_since = now_;
  }
  DropSessionIfUnused(*session);
}

NodeCore::Impl::Session* NodeCore::Impl::SessionOf(ConnectionId c) {
  auto it = connections_.find(c);
  if (it == connections_.end() || !it->second.session) return nullptr;
  auto s = sessions_.find(*it->second.session);
  return s == sessions_.end() ? nullptr : &s->second;
}

bool NodeCore::Impl::IsAlive(const Id128& session) const { return sessions_.contains(session); }

std::optional<Nanos> NodeCore::Impl::SilenceEnds(const Id128& id, const Session& session) const {
  if (!session.unwatchable || !session.connections.empty()) return std::nullopt;
  if (std::any_of(leases_.begin(), leases_.end(), [&](const auto& l) { return l.second.session == id; })) return std::nullopt;
  return session.silent_since + config_.lease_ns;
}

bool NodeCore::Impl::LacksAWriter(const NamespaceKey& ns, const Attempt& attempt, const Id128& dead) const {
  const Id128 id = attempt.key.AttemptId();
  for (uint32_t rank = 0; rank < attempt.world_size; ++rank) {
    if (attempt.records.contains(rank) || lease_of_.contains({id, rank})) continue;
    auto writer = writers_.find({ns, attempt.key.generation, rank});
    if (writer == writers_.end() || writer->second == dead || !IsAlive(writer->second)) return true;
  }
  return false;
}

Status NodeCore::Impl::Hello(ConnectionId c, const Frame& f) {
  auto request = Decode<HelloRequest>(f.body);
  if (f.version != kProtocolVersion || !request || request->version_min > kProtocolVersion || request->version_max < kProtocolVersion) {
    return Status(StatusCode::kProtocol, "this daemon speaks protocol version " + std::to_string(kProtocolVersion) + ", the client " +
                                             (request ? std::to_string(request->version_min) + " to " + std::to_string(request->version_max)
                                                      : std::to_string(f.version)));
  }
  if (stopping_) return Status(StatusCode::kUnavailable, "the daemon is stopping");
  Connection& connection = connections_.at(c);
  const SessionKey key{request->session, connection.uid, connection.pid, connection.start_time};
  if (key.session.is_zero()) return Status(StatusCode::kInvalidArgument, "the session id is zero");
  auto it = sessions_.find(key.session);
  if (it != sessions_.end() && !SameProcess(it->second.key, key)) {
    return Status(StatusCode::kDenied, "this session belongs to another process");
  }
  if (connection.session && *connection.session != key.session) return Status(StatusCode::kInvalidArgument, "this connection has a session");
  if (it == sessions_.end()) {
    const auto of_uid = std::count_if(sessions_.begin(), sessions_.end(), [&](const auto& s) { return s.second.key.uid == key.uid; });
    if (static_cast<uint32_t>(of_uid) >= config_.connections_per_uid_max * 4) return Status(StatusCode::kLimit, "too many sessions of this uid");
    it = sessions_.emplace(key.session, Session{key, {}, false, false, now_}).first;
    actions_.push_back(action::WatchSession{key, c});
    // What an ended session of the same living process still holds is this one's now.
    std::vector<Id128> ended;
    for (const auto& [id, s] : sessions_) {
      if (s.ended && key.pid != 0 && key.start_time != 0 && s.key.uid == key.uid && s.key.pid == key.pid && s.key.start_time == key.start_time) {
        ended.push_back(id);
      }
    }
    for (const Id128& id : ended) {
      pool_.TransferLent(id, key.session);
      DropSessionIfUnused(id);
    }
  }
  connection.session = key.session;
  it->second.connections.insert(c);
  HelloReply reply;
  reply.node = config_.node;
  reply.boot = config_.boot;
  reply.incarnation = config_.incarnation;
  reply.extent_bytes = config_.extent_bytes;
  reply.pool_bytes_max = config_.extent_bytes * config_.extents_max;
  reply.lease_ns = static_cast<uint64_t>(config_.lease_ns);
  reply.retain = MostRetained();
  reply.daemon_pid = config_.daemon_pid;
  reply.is_private = config_.is_private;
  reply.daemon_version = config_.version;
  reply.store = config_.store;
  return Reply(c, f, reply);
}

Status NodeCore::Impl::Bye(ConnectionId c, const Frame& f) {
  const Id128 session = SessionOf(c)->key.session;
  EndSessionUse(session, false);
  return Reply(c, f, Empty{});
}

// Everything the session was doing ends. `dead`: its process can touch nothing any more; else it has only promised to.
void NodeCore::Impl::EndSessionUse(const Id128& id, bool dead) {
  auto it = sessions_.find(id);
  if (it == sessions_.end()) return;
  const bool unwatchable = it->second.unwatchable;
  const std::string who = "pid " + std::to_string(it->second.key.pid) + (dead ? " died" : " said goodbye");
  it->second.ended = true;
  std::vector<std::pair<NamespaceKey, Id128>> close;
  std::vector<uint64_t> ended;
  for (const auto& [lease_id, lease] : leases_) {
    if (lease.session != id) continue;
    ended.push_back(lease_id);
    close.emplace_back(NamespaceKey{lease.entry.key.uid, lease.entry.key.ns}, lease.attempt);
  }
  for (uint64_t lease : ended) EndLease(lease, false);
  // Attempts that wait for a rank of this session which has not even begun can never be complete either.
  for (auto w = writers_.begin(); w != writers_.end();) {
    const auto& [ns, generation, rank] = w->first;
    if (w->second != id) {
      ++w;
      continue;
    }
    for (const Attempt* a : catalog_.OpenAttempts(ns)) {
      if (a->key.generation == generation && !a->records.contains(rank)) close.emplace_back(ns, a->key.AttemptId());
    }
    w = writers_.erase(w);
  }
  // After a restart nobody knows who the ranks are that have not begun. Where one that has sealed is dead now, the others will not come.
  for (const NamespaceKey& ns : catalog_.Namespaces()) {
    if (!dead || ns.uid != it->second.key.uid) continue;
    for (const Attempt* a : catalog_.OpenAttempts(ns)) {
      const Id128 attempt = a->key.AttemptId();
      const bool took_part = std::any_of(a->records.begin(), a->records.end(), [&](const auto& r) {
        return pool_.FindSlot(sealed_.at({attempt, r.first}).slot)->entry.session.session == id;
      });
      if (took_part && LacksAWriter(ns, *a, id)) close.emplace_back(ns, attempt);
    }
  }
  std::vector<uint64_t> builds;
  for (const auto& [build_id, build] : builds_) {
    if (build.session.session == id) builds.push_back(build_id);
  }
  for (uint64_t build : builds) CancelBuild(build, Status(StatusCode::kClosed, "the session has ended"));
  for (const auto& [ns, attempt] : close) CloseAttempt(ns, attempt, "a writer is gone: " + who);
  std::vector<uint64_t> pins;
  for (const auto& [pin_id, pin] : pins_) {
    if (pin.entry.session.session == id) pins.push_back(pin_id);
  }
  for (uint64_t pin : pins) DropPin(pin);
  std::vector<uint64_t> idle;
  for (uint64_t slot : pool_.SlotsOf(id)) {
    const PoolSlot* s = pool_.FindSlot(slot);
    if (s->state == SlotState::kZombie) {
      Commit(ledger::LeaseEnded{0, slot, false});
      s = pool_.FindSlot(slot);
    }
    if (dead && s->state == SlotState::kIdle) idle.push_back(slot);
  }
  if (dead) {
    if (unwatchable) {
      unwatchable_gone_.insert(id);
      if (auto dropped = pool_.Abandon(id); !dropped.empty()) DropExtents(it->second.key, std::move(dropped));
    } else {
      pool_.Forget(id);
    }
    actions_.push_back(action::UnwatchSession{id});
    sessions_.erase(id);
    for (uint64_t slot : idle) ReleaseSlot(slot);
    if (pool_.SlotsOf(id).empty()) unwatchable_gone_.erase(id);
  } else {
    DropSessionIfUnused(id);
  }
}

void NodeCore::Impl::DropSessionIfUnused(const Id128& id) {
  auto it = sessions_.find(id);
  if (it == sessions_.end() || !it->second.connections.empty() || !pool_.SlotsOf(id).empty() || pool_.HoldsLent(id)) return;
  const auto mine = [&](const auto& x) { return x.second.entry.session.session == id; };
  if (std::any_of(pins_.begin(), pins_.end(), mine)) return;
  EndSessionUse(id, true);  // It holds nothing: as good as dead.
}

void NodeCore::Impl::On(const event::SessionDied& e) {
  auto it = sessions_.find(e.session);
  if (it == sessions_.end()) return;
  busy_at_ = now_;
  Log(Severity::kInfo, "session_died", {{"pid", std::to_string(it->second.key.pid)}, {"session", e.session.ToHex()}});
  EndSessionUse(e.session, true);
}

void NodeCore::Impl::On(const event::SessionUnwatchable& e) {
  auto it = sessions_.find(e.session);
  if (it == sessions_.end()) return;
  it->second.unwatchable = true;
  Log(Severity::kWarning, "session_unwatchable",
      {{"pid", std::to_string(it->second.key.pid)}, {"consequence", "its extents are replaced, not reused, when it is gone"}});
}

}  // namespace sp
