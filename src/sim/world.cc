#include "sim/world.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/sha256.h"

namespace sp::sim {
namespace {

constexpr uint64_t kExtentBytes = 8192;
constexpr size_t kProcessesMax = 24;  // Living ones.

CoreConfig MakeCoreConfig(const WorldConfig& config) {
  CoreConfig c;
  c.node.bytes[0] = 1;
  c.boot.bytes[1] = 1;
  c.version = "simulated";
  c.extent_bytes = kExtentBytes;
  c.extents_max = config.extents_max;
  c.retain = config.retain;
  return c;
}

Id128 MakeId(uint64_t a, uint64_t b) {
  Id128 id;
  for (size_t i = 0; i < 8; ++i) {
    id.bytes[i] = static_cast<uint8_t>(Mix(a, b) >> (8 * i));
    id.bytes[8 + i] = static_cast<uint8_t>(Mix(b, a) >> (8 * i));
  }
  return id;
}

}  // namespace

const char* OpName(OpKind kind) {
  static constexpr const char* kNames[kOpKinds] = {"client", "deliver", "job", "advance", "leap", "launch", "reader", "kill", "kill launch", "stop",
                                                   "scribble", "disconnect", "repeat", "garbage", "bye", "kill worker", "compact", "no memory",
                                                   "operator", "lose keeper", "forge", "audit"};
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
  return c;
}

World::World(const WorldConfig& config)
    : config_(config), node_(*this, MakeCoreConfig(config), uint64_t{1} << 20, uint64_t{16} << 10), model_(config.retain) {
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
      if (complete.empty()) break;
      const ModelAttempt& a = *complete[op.arg % complete.size()];
      const bool on = op.arg % 3 == 0;
      AskDirectly(a.ns.uid, MessageType::kPinStep, Encode(PinStepRequest{a.ns.ns, a.key.AttemptId(), on}));
      break;
    }
    case OpKind::kLoseKeeper:
      if (op.arg % 8 == 0) node_.LoseKeeper();
      break;
    case OpKind::kForge:
      if (auto p = Pick(op.arg >> 24, [](const Process& q) { return q.alive && q.connection != 0 && q.greeted; })) Forge(*p, op.arg & 0xffffff);
      break;
    case OpKind::kAudit: Audit(); break;
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
  const auto lineage = model_.Lineage(launch.ns);
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
      if (a.tombstone) continue;
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
  model_.Append(node_.now(), node_.config().pin_ns, entry);
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
    seal_replies_.clear();
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

// --- audits ----------------------------------------------------------------------------------------------------------------------------------

Frame World::AskDirectly(uint32_t uid, MessageType type, std::vector<uint8_t> body) {
  while (true) {  // Again when a kill of the worker swallows the answer.
    const ConnectionId c = next_connection_++;
    audit_reply_.reset();
    audit_connection_ = c;
    ++audits_;
    node_.Deliver(event::Connected{c, uid, 7, audits_});
    HelloRequest hello;
    hello.session = MakeId(config_.seed ^ 0x6175646974, audits_);
    if (audit_connection_ == c) node_.Deliver(event::Received{c, MakeFrame(MessageType::kHello, 1, hello)});
    if (audit_connection_ == c) node_.Deliver(event::Received{c, Frame{kProtocolVersion, type, 2, StatusCode::kOk, body}});
    const bool answered = audit_reply_ && audit_reply_->request_id == 2;
    if (audit_connection_ == c) node_.Deliver(event::Disconnected{c});
    audit_connection_ = 0;
    if (answered) return *audit_reply_;
  }
}

void World::Audit() {
  node_.CallOffKill();  // A restart between an answer and its comparison would compare two states.
  for (uint32_t i = 0; i < config_.uids * config_.namespaces; ++i) AuditNamespace(NamespaceAt(i));
  CompareReplay();
}

void World::AuditNamespace(const NamespaceKey& ns) {
  const Frame latest = AskDirectly(ns.uid, MessageType::kLatest, Encode(NamespaceRequest{ns.ns, Level::kMemory, 0}));
  const ModelAttempt* expected = model_.Latest(ns);
  if (expected) {
    Require(latest.status == StatusCode::kOk, "I-6: there is a latest step, and the daemon says there is none");
    Require(Decode<AttemptInfo>(latest.body)->attempt == expected->key.AttemptId(), "I-6: latest is another step than the newest of the lineage");
  } else {
    Require(latest.status != StatusCode::kOk, "I-1: latest is something that is not complete");
    Require(latest.status == model_.NothingLeft(ns), "I-31: never, lost and unknown are mixed up");
  }
  const Frame listing = AskDirectly(ns.uid, MessageType::kListSteps, Encode(NamespaceRequest{ns.ns, Level::kMemory, 0}));
  Require(listing.status == StatusCode::kOk, "I-31: the listing failed");
  std::set<Id128> complete;
  const Result<ListStepsReply> listed = Decode<ListStepsReply>(listing.body);
  Require(listed.has_value(), "I-40: the listing does not decode");
  for (const AttemptInfo& info : listed->attempts) {
    const ModelAttempt* a = model_.Find(info.attempt);
    Require(a && a->ns == ns, "I-38: a listing names somebody else's step");
    Require(!a->tombstone, "I-16: a listing names a step that has a tombstone");
    if (info.state != AttemptState::kComplete) continue;
    Require(model_.Complete(*a), "I-1: something is listed as complete that is not");
    complete.insert(info.attempt);
  }
  for (const auto& [id, a] : model_.attempts()) {
    if (a.ns != ns || !model_.Complete(a) || complete.contains(id)) continue;
    std::string why = "unknown to the daemon";
    for (const AttemptInfo& info : listed->attempts) {
      if (info.attempt == id) why = std::string(AttemptStateName(info.state)) + ", " + info.reason;
    }
    Fail("I-5: step " + std::to_string(a.key.step) + " is complete and not listed any more: " + why);
  }
}

// What a restarted worker would know is what this one knows.
void World::CompareReplay() {
  CoreConfig config = node_.config();
  NodeCore replayed(config);
  replayed.Restore(node_.now(), node_.LedgerContents(), node_.ExtentIds());
  const Status status = replayed.CheckInvariants();
  if (!status.ok()) Fail("I-25: a replay: " + status.message());
  const auto facts = [](const NodeCore& core) {
    std::map<std::vector<uint8_t>, std::string> set;
    const auto add = [&](const LedgerEntry& e) { set[EncodeLedgerEntry(e)] = std::visit([](const auto& x) { return std::string(x.kName); }, e); };
    for (const LedgerEntry& e : core.Snapshot()) {
      if (std::holds_alternative<ledger::SlotGone>(e)) continue;
      if (const auto* slot = std::get_if<ledger::Slot>(&e); slot && slot->slot == 1) continue;  // Free extents: a replay knows less of them.
      if (const auto* lease = std::get_if<ledger::LeaseEnded>(&e)) {
        add(ledger::SlotGone{lease->slot});
        continue;
      }
      add(e);
    }
    return set;
  };
  const auto retired = [](const NodeCore& core) {
    std::set<Id128> set;
    for (const LedgerEntry& e : core.Snapshot()) {
      if (const auto* t = std::get_if<ledger::Tombstone>(&e); t && t->why == ledger::TombstoneWhy::kRetired) set.insert(t->attempt);
    }
    return set;
  };
  // What a group of readers has agreed on is not in the ledger (their pins are): a restart may retire what only the agreement kept.
  if (retired(node_.core()) != retired(replayed)) return;
  const auto live = facts(node_.core()), again = facts(replayed);
  for (const auto& [bytes, name] : live) {
    if (!again.contains(bytes)) Fail("I-25: a replay of the ledger lacks a " + name);
  }
  for (const auto& [bytes, name] : again) {
    if (!live.contains(bytes)) Fail("I-25: a replay of the ledger has one more " + name);
  }
}

void World::Finish() {
  for (size_t p = 0; p < processes_.size(); ++p) {
    processes_[p].stopped = false;
    Kill(p);
  }
  node_.FailNextExtents(0);
  for (int i = 0; i < 6; ++i) {
    DeliverAll();
    node_.Advance(1800 * kNanosPerSecond);
    node_.RunTimers();
  }
  Audit();
  for (const auto& [id, a] : model_.attempts()) {
    Require(a.tombstone || a.manifest || a.shards.empty(), "I-28: an attempt stays open although nobody is left who could finish it");
  }
  uint64_t kept = 0;
  for (const auto& [id, slot] : model_.slots()) {
    static constexpr const char* kUses[] = {"idle", "leased", "sealed", "zombie"};
    if (slot.use != Use::kSealed) {
      Fail("I-28: slot " + std::to_string(id) + " of pid " + std::to_string(slot.entry.session.pid) + " is " + kUses[static_cast<int>(slot.use)] +
           " although everybody is dead");
    }
    kept += slot.entry.extents.size();
  }
  const auto pool = nlohmann::json::parse(node_.core().StatusJson(node_.now(), 0, true))["pool"];
  Require(pool["sealed"] == kept * kExtentBytes, "I-28: the pool counts other bytes than the listed steps have");
  for (const char* what : {"leased", "zombie", "idle", "pending", "creating"}) Require(pool[what] == 0, "I-28: something is held by nobody");
  Require(model_.pins().empty(), "I-28: a pin outlives its reader");
  // Progress: one rank of every identity saves, if there is room for it.
  for (uint32_t i = 0; i < config_.uids; ++i) {
    StartLaunch(i, true);
    const size_t p = processes_.size() - 1;
    const uint64_t before = acknowledged_;
    processes_[p].watchable = true;
    for (int n = 0; n < 40 && acknowledged_ == before; ++n) {
      Step(p, 8 * 1024);
      DeliverAll();
    }
    const bool room = kept + uint64_t{i + 1} * config_.shard_extents_max <= config_.extents_max;
    if (room && acknowledged_ == before) Fail("I-30: nothing can be saved although all faults are over");
  }
  Audit();
}

}  // namespace sp::sim
