#include "sim/world.h"

#include <algorithm>

namespace sp::sim {
namespace {

constexpr size_t kProcessesMax = 24;  // Living ones.

CoreConfig MakeCoreConfig(const WorldConfig& config) {
  CoreConfig c;
  c.node.bytes[0] = 1;
  c.boot.bytes[1] = 1;
  c.version = "simulated";
  c.extent_bytes = 8192;
  c.extents_max = config.extents_max;
  c.retain = config.retain;
  c.retain_every = config.retain_every;
  c.retain_for = config.retain_for_s * kNanosPerSecond;
  c.retain_max = config.retain + config.spared_max;
  if (config.store) c.store = "sim://store";
  c.durable_every = config.durable_every;
  c.durable_interval = config.durable_interval_s * kNanosPerSecond;
  c.drains_max = config.drains_max;
  if (config.durable_keeps > 0) c.durable_keeps = config.durable_keeps;
  return c;
}

}  // namespace

Id128 MakeId(uint64_t a, uint64_t b) {
  Id128 id;
  for (size_t i = 0; i < 8; ++i) {
    id.bytes[i] = static_cast<uint8_t>(Mix(a, b) >> (8 * i));
    id.bytes[8 + i] = static_cast<uint8_t>(Mix(b, a) >> (8 * i));
  }
  return id;
}

const char* OpName(OpKind kind) {
  static constexpr const char* kNames[kOpKinds] = {"client", "deliver", "job", "advance", "leap", "launch", "reader", "kill", "kill launch", "stop",
                                                   "scribble", "disconnect", "repeat", "garbage", "bye", "kill worker", "compact", "no memory",
                                                   "operator", "lose keeper", "forge", "audit", "store", "store fault", "wish", "terminate"};
  return kNames[static_cast<size_t>(kind)];
}

WorldConfig MakeConfig(uint64_t seed) {
  Random random(Mix(seed, 1));
  WorldConfig c;
  c.seed = seed;
  c.uids = 1 + static_cast<uint32_t>(random.Below(2));
  c.namespaces = 1 + static_cast<uint32_t>(random.Below(2));
  c.ranks_max = 1 + static_cast<uint32_t>(random.Below(4));
  c.retain = 1 + static_cast<uint32_t>(random.Below(3));
  c.shard_extents_max = 1 + static_cast<uint32_t>(random.Below(3));
  c.extents_max = 2 + static_cast<uint32_t>(random.Below(c.ranks_max * (c.retain + 1) * c.shard_extents_max * c.uids + 4));
  c.unwatchable = random.Percent(20);
  c.store = random.Percent(60);
  c.store_verifies = random.Percent(50);
  c.durable_every = 10 * static_cast<uint32_t>(random.Below(4));  // Steps are multiples of ten.
  c.durable_interval_s = random.Percent(30) ? 5 + static_cast<uint32_t>(random.Below(60)) : 0;
  c.drains_max = 1 + static_cast<uint32_t>(random.Below(3));
  if (c.store && random.Percent(33)) c.durable_keeps = 1 + static_cast<uint32_t>(random.Below(3));
  if (random.Percent(25)) c.retain_every = 20;
  if (random.Percent(25)) c.retain_for_s = 5 + static_cast<uint32_t>(random.Below(60));
  c.spared_max = static_cast<uint32_t>(random.Below(3));
  return c;
}

World::World(const WorldConfig& config)
    : config_(config),
      store_(config.store_verifies),
      node_(*this, MakeCoreConfig(config), config.store ? &store_ : nullptr, uint64_t{1} << 20, uint64_t{16} << 10),
      model_(config.retain, config.store, config.durable_keeps) {
  node_.Start();
}

NamespaceKey World::NamespaceAt(uint32_t arg) const {
  const uint32_t uid = 1000 + arg % config_.uids;
  return {uid, "job" + std::to_string(arg / config_.uids % config_.namespaces)};
}

template <typename F>
std::optional<size_t> World::Pick(uint32_t arg, F&& wanted) const {
  std::vector<size_t> found;
  for (size_t i = 0; i < processes_.size(); ++i) {
    if (wanted(processes_[i])) found.push_back(i);
  }
  if (found.empty()) return std::nullopt;
  return found[Mix(arg) % found.size()];
}

void World::Run(const Op& op) {
  const auto living = [](const Process& p) { return p.alive && !p.stopped; };
  const uint32_t more = op.arg >> 8;
  switch (op.kind) {
    case OpKind::kClient:
      if (auto p = Pick(op.arg, living)) Step(*p, more);
      break;
    case OpKind::kDeliver: {
      std::vector<ConnectionId> waiting;
      for (const auto& [c, s] : sockets_) {
        if (!s.queue.empty() || s.broken) waiting.push_back(c);
      }
      if (!waiting.empty()) DeliverFrom(waiting[op.arg % waiting.size()]);
      break;
    }
    case OpKind::kJob:
      if (node_.jobs() > 0) node_.RunJob(op.arg % node_.jobs());
      break;
    case OpKind::kAdvance:
      node_.Advance(static_cast<Nanos>(op.arg % 4000) * kNanosPerMilli);
      if (op.arg % 4 != 0) node_.RunTimers();  // Else they are late.
      break;
    case OpKind::kLeap:
      node_.Advance(static_cast<Nanos>(20 + op.arg % (op.arg % 8 == 0 ? 1500 : 90)) * kNanosPerSecond);
      node_.RunTimers();
      break;
    case OpKind::kLaunch: StartLaunch(op.arg, false); break;
    case OpKind::kReader: StartReader(op.arg); break;
    case OpKind::kKill:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.alive; })) Kill(*p);
      break;
    case OpKind::kKillLaunch:
      if (!launches_.empty()) {
        const size_t recent = std::min<size_t>(launches_.size(), 3);
        for (size_t p : launches_[launches_.size() - 1 - op.arg % recent].processes) Kill(p);
      }
      break;
    case OpKind::kStop:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.alive; })) processes_[*p].stopped = !processes_[*p].stopped;
      break;
    case OpKind::kScribble:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.alive && !q.slots.empty(); })) Scribble(*p, more);
      break;
    case OpKind::kDisconnect:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.connection != 0; })) Break(processes_[*p].connection);
      break;
    case OpKind::kRepeat:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.connection != 0 && q.greeted && !q.sent.empty(); })) {
        auto it = std::next(processes_[*p].sent.begin(), static_cast<ptrdiff_t>(more % processes_[*p].sent.size()));
        sockets_.at(processes_[*p].connection).queue.push_back(it->second);
      }
      break;
    case OpKind::kGarbage:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.connection != 0 && q.greeted; })) Garbage(*p, more);
      break;
    case OpKind::kBye:
      if (auto p = Pick(op.arg, [](const Process& q) { return q.alive && q.connection != 0 && q.greeted && !q.awaiting; })) {
        SayGoodbye(*p);
      }
      break;
    case OpKind::kKillWorker: node_.KillWorkerAfter(op.arg % 24, more); break;
    case OpKind::kCompact: node_.Compact(); break;
    case OpKind::kNoMemory: node_.FailNextExtents(1 + op.arg % 3); break;
    case OpKind::kOperator: {
      std::vector<const ModelAttempt*> complete;
      for (const auto& [id, a] : model_.attempts()) {
        if (model_.Complete(a)) complete.push_back(&a);
      }
      if (complete.empty() || node_.stopping()) break;
      const ModelAttempt& a = *complete[op.arg % complete.size()];
      const bool on = op.arg % 3 == 0;
      AskDirectly(a.ns.uid, MessageType::kPinStep, Encode(PinStepRequest{a.ns.ns, a.key.AttemptId(), on}));
      break;
    }
    case OpKind::kLoseKeeper:
      if (op.arg % (config_.store ? 2 : 8) == 0) node_.LoseKeeper();
      break;
    case OpKind::kForge:
      if (auto p = Pick(op.arg >> 24, [](const Process& q) { return q.alive && q.connection != 0 && q.greeted; })) Forge(*p, op.arg & 0xffffff);
      break;
    case OpKind::kAudit: Audit(); break;
    case OpKind::kStore:
    case OpKind::kStoreFault:
    case OpKind::kWish:
    case OpKind::kTerminate: RunDurable(op); break;
  }
}

// --- processes come and go -----------------------------------------------------------------------------------------------------------------

size_t World::NewProcess(uint32_t uid, uint32_t arg) {
  Process p;
  const uint64_t number = processes_.size() + 1;
  p.key = SessionKey{MakeId(config_.seed, number), uid, static_cast<uint32_t>(100 + number), 5000 + number};
  p.sessions = {p.key.session};
  p.watchable = !config_.unwatchable || arg % 4 != 0;
  processes_.push_back(std::move(p));
  return processes_.size() - 1;
}

void World::StartLaunch(uint32_t arg, bool plain) {
  const auto living = std::count_if(processes_.begin(), processes_.end(), [](const Process& p) { return p.alive; });
  if (!plain && static_cast<size_t>(living) + config_.ranks_max > kProcessesMax) return;
  Launch launch;
  launch.ns = NamespaceAt(arg);
  launch.nonce = MakeId(config_.seed ^ 0x6e6f6e6365, launches_.size() + 1);
  launch.world_size = plain ? 1 : 1 + (arg >> 4) % config_.ranks_max;
  std::optional<Model> both;
  const auto lineage = KnownOf(launch.ns, both).Lineage(launch.ns);
  launch.first_step = lineage.empty() ? 0 : lineage.front()->key.step + 10;
  if (!plain) {
    launch.bad_coverage = (arg >> 8) % 16 == 0;
    if (const uint32_t how = (arg >> 12) % 8; how == 0) {
      launch.mode = ParentMode::kFresh;
      launch.first_step = 0;
    } else if (how <= 2 && !lineage.empty()) {  // Roll back.
      launch.mode = ParentMode::kAttempt;
      const ModelAttempt& to = *lineage[(arg >> 16) % lineage.size()];
      launch.parent = to.key.AttemptId();
      launch.first_step = to.key.step + 10;
    }
    // The launcher kills what was left of the job, mostly: else there are two at once (F79).
    for (const Launch& old : launches_) {
      if (old.ns != launch.ns || (arg >> 20) % 4 == 0) continue;
      for (size_t p : old.processes) Kill(p);
    }
  }
  for (uint32_t rank = 0; rank < launch.world_size; ++rank) {
    const size_t p = NewProcess(launch.ns.uid, arg + rank);
    processes_[p].launch = launches_.size();
    processes_[p].rank = rank;
    launch.processes.push_back(p);
  }
  launches_.push_back(std::move(launch));
}

void World::StartReader(uint32_t arg) {
  const auto living = std::count_if(processes_.begin(), processes_.end(), [](const Process& p) { return p.alive; });
  if (launches_.empty() || static_cast<size_t>(living) >= kProcessesMax) return;
  const size_t launch = launches_.size() - 1 - arg % std::min<size_t>(launches_.size(), 3);
  const size_t p = NewProcess(launches_[launch].ns.uid, arg >> 8);
  processes_[p].reader = true;
  processes_[p].launch = launch;
  processes_[p].rank = launches_[launch].readers++ % 4;
}

void World::Kill(size_t p) {
  Process& process = processes_[p];
  if (!process.alive) return;
  process.alive = false;
  process.slots.clear();
  process.read_only.clear();
  process.reading = {};
  for (const Id128& session : process.sessions) model_.SessionGone(session);
  if (process.connection != 0) Break(process.connection);
  node_.ProcessDied(process.key.pid);
}

void World::Break(ConnectionId c) {
  Socket& socket = sockets_.at(c);
  socket.broken = true;
  Process& process = processes_[socket.process];
  process.connection = 0;
  process.greeted = false;
}

void World::DeliverFrom(ConnectionId c) {
  Socket& socket = sockets_.at(c);
  if (socket.queue.empty()) {
    sockets_.erase(c);
    return node_.Deliver(event::Disconnected{c});
  }
  const Frame frame = std::move(socket.queue.front());
  socket.queue.pop_front();
  node_.Deliver(event::Received{c, frame});
}

void World::DeliverAll() {
  while (true) {
    node_.RunAllJobs();
    auto it = std::find_if(sockets_.begin(), sockets_.end(), [](const auto& s) { return !s.second.queue.empty() || s.second.broken; });
    if (it == sockets_.end()) return;
    DeliverFrom(it->first);
  }
}

void World::Scribble(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  auto slot = std::next(process.slots.begin(), static_cast<ptrdiff_t>(arg % process.slots.size()));
  if (slot->second.empty()) return;
  const MemoryRef memory = slot->second[arg / 16 % slot->second.size()];
  memory->word = static_cast<uint32_t>(Mix(arg, memory->id)) | 1;
  for (const auto& [id, a] : model_.attempts()) {
    for (const auto& [rank, shard] : a.shards) {
      if (!shard.here) continue;
      auto of = model_.slots().find(shard.slot);
      if (of == model_.slots().end()) continue;
      const auto& extents = of->second.entry.extents;
      const bool hit = std::find(extents.begin(), extents.end(), memory->id) != extents.end() && node_.FindExtent(memory->id) == memory;
      if (!hit) continue;
      if (of->second.entry.session.session != process.key.session) Fail("I-10: a process can write to another's shard");
      scribbled_.insert(shard.record.Identity());
    }
  }
}

void World::Garbage(size_t p, uint32_t arg) {
  Frame frame;
  frame.type = static_cast<MessageType>(2 + arg % 17);
  frame.request_id = 1'000'000 + arg;
  if (arg % 5 == 0) {
    frame.body.assign(arg % 40, static_cast<uint8_t>(arg));
  } else {  // Well formed, with small numbers that may well be somebody's ids.
    const uint64_t id = node_.config().incarnation << 32 | (arg >> 5) % 64;
    const NamespaceKey ns = NamespaceAt(arg >> 3);
    switch (frame.type) {
      case MessageType::kFetchExtents: frame.body = Encode(FetchExtentsRequest{arg % 2 == 0, id, id, arg % 3, arg % 5}); break;
      case MessageType::kSeal: frame.body = Encode(SealRequest{id, 4096, 4092, 32, {}, {}, 0}); break;
      case MessageType::kRenew: frame.body = Encode(LeaseRequest{id, ""}); break;
      case MessageType::kShardInfo: frame.body = Encode(ShardRequest{id, arg % 4, 0}); break;
      case MessageType::kReportCorrupt: frame.body = Encode(ShardRequest{id, arg % 4, 0}); break;
      case MessageType::kReserve:
        frame.body = Encode(ReserveRequest{ns.ns, arg % 4, launches_.empty() ? Id128{} : launches_.back().nonce, arg % 50, arg % 3, 1 + arg % 3, arg % 3,
                                           4096u << arg % 30, 0});
        break;
      case MessageType::kListSteps: frame.body = Encode(NamespaceRequest{ns.ns, Level::kMemory, arg % 9}); break;
      default: frame.body.assign(arg % 60, static_cast<uint8_t>(arg >> 4)); break;
    }
  }
  sockets_.at(processes_[p].connection).queue.push_back(std::move(frame));
}

// --- what the node tells --------------------------------------------------------------------------------------------------------------------

void World::OnAppended(const LedgerEntry& entry) {
  // Nobody can tell when an unwatchable process dies, so silence must do; its extents are dropped then, which CheckNoForeignWriter sees to.
  if (const auto* ended = std::get_if<ledger::LeaseEnded>(&entry)) {
    const auto slot = model_.slots().find(ended->slot);
    if (slot != model_.slots().end() && !IsWatchable(slot->second.entry.session)) model_.WriterPromised(ended->lease);
  } else if (const auto* pin = std::get_if<ledger::ReadPin>(&entry); pin && !IsWatchable(pin->session)) {
    model_.PinGivenBack(pin->pin);
  }
  if (TakenOver(entry)) return;
  CheckStored(entry);
  model_.Append(node_.now(), node_.config().pin_ns, entry);
  if (const auto* stored = std::get_if<ledger::StoredManifest>(&entry)) {
    durable_ += model_.Find(SealRecord::Decode(stored->record.span())->attempt)->HasMemory();
  }
  if (const auto* manifest = std::get_if<ledger::Manifest>(&entry)) {  // Its launch has saved: nobody in it is still choosing.
    const Id128 nonce = SealRecord::Decode(manifest->record.span())->key.nonce;
    std::erase_if(choices_, [&](const auto& c) { return c.first.first == nonce; });
  }
  if (const auto* slot = std::get_if<ledger::Slot>(&entry)) CheckNoForeignWriter(*slot);
}

// The heart of I-10 and I-38: who else can store into, or look at, what a process is given now? One that is dead may have left a child that can,
// which nobody sees: so nothing is ever lent under two uids.
void World::CheckNoForeignWriter(const ledger::Slot& slot) {
  for (uint32_t id : slot.extents) {
    const MemoryRef memory = node_.FindExtent(id);
    Require(memory != nullptr, "I-10: a slot of an extent that the keeper does not have");
    Require(memory->uid.value_or(slot.session.uid) == slot.session.uid, "I-38: memory that was lent to another identity");
    memory->uid = slot.session.uid;
    for (const Process& p : processes_) {
      if (!p.alive || p.key.pid == slot.session.pid) continue;
      for (const auto& [mapped, extents] : p.slots) {
        Require(std::find(extents.begin(), extents.end(), memory) == extents.end(), "I-10: memory that a living process can write to is another's now");
      }
      Require(p.key.uid == slot.session.uid || std::find(p.read_only.begin(), p.read_only.end(), memory) == p.read_only.end(),
              "I-38: memory that another identity's process can read");
    }
  }
}

void World::OnSealChecked(uint64_t lease, bool passed) {
  if (passed) model_.SealCheckPassed(lease);
  else model_.WriterPromised(lease);
}

void World::OnRestarted(bool keeper_lost) {
  sockets_.clear();
  choices_.clear();
  for (Process& p : processes_) {
    p.connection = 0;
    p.greeted = false;
  }
  audit_connection_ = 0;
  if (keeper_lost) {
    model_.KeeperLost();
    // A kill between the ledger's entry and the marker's file is made good by the next worker. A daemon that is to end starts none; nobody was told of the
    // step yet.
    if (node_.stopping()) model_.ForgetUnmarked(node_.config().markers);
    seal_replies_.clear();
    // Ids of leases and pins begin again, and the client library repeats what names one only to the boot that gave it.
    for (Process& p : processes_) {
      std::erase_if(p.sent, [&](const auto& sent) {
        const MessageType type = sent.second.type;
        const bool awaited = p.awaiting && p.awaiting->request_id == sent.first;
        return !awaited && (type == MessageType::kAbort || type == MessageType::kRenew || type == MessageType::kSeal || type == MessageType::kUnpin);
      });
    }
    store_.DropLate();  // Nothing of the node is left, on no wire either.
  }
  model_.WorkerRestarted(node_.now(), node_.config().pin_ns);
}

bool World::IsProcessDead(const SessionKey& session) const {
  for (const Process& p : processes_) {
    if (p.key.pid == session.pid) return !p.alive && p.watchable;
  }
  return false;  // An auditor's.
}

bool World::IsWatchable(const SessionKey& session) const {
  for (const Process& p : processes_) {
    if (p.key.pid == session.pid) return p.watchable;
  }
  return true;
}

const ShardIndex* World::FindStructure(const Hash256& hash) const {
  auto it = structures_.find(hash);
  return it == structures_.end() ? nullptr : &it->second;
}

}  // namespace sp::sim
