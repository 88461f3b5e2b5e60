// Latest, listing and a replay of the ledger compared with the model; and what must be left when everybody is dead.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "sim/world.h"

namespace sp::sim {

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
    const auto answered = [&] { return audit_reply_ && audit_reply_->request_id == 2; };
    while (audit_connection_ == c && !answered() && node_.RunListing()) {
    }
    const bool waits = audit_connection_ == c && !answered();
    if (audit_connection_ == c) node_.Deliver(event::Disconnected{c});
    audit_connection_ = 0;
    if (waits) return Frame::Error(type, 2, Status(StatusCode::kDeadline, "the store has not answered"));
    if (answered()) return *audit_reply_;
  }
}

void World::Audit() {
  if (node_.stopping()) return;  // It takes no new connection.
  node_.CallOffKill();  // A restart between an answer and its comparison would compare two states.
  for (uint32_t i = 0; i < config_.uids * config_.namespaces; ++i) AuditNamespace(NamespaceAt(i));
  CompareReplay();
}

void World::AuditNamespace(const NamespaceKey& ns) {
  const Frame latest = AskDirectly(ns.uid, MessageType::kLatest, Encode(NamespaceRequest{ns.ns, Level::kMemory, 0}));
  // The same question, so the same listing of the store.
  const Frame listing = AskDirectly(ns.uid, MessageType::kListSteps, Encode(NamespaceRequest{ns.ns, Level::kMemory, 0}));
  std::optional<Model> both;
  const Model& known = KnownOf(ns, both);
  for (const Frame* answer : {&latest, &listing}) {
    const bool waits = answer->status == StatusCode::kDeadline;
    if (waits) Require(config_.store && !model_.IsMine(ns) && store_.health() == StoreHealth::kHangs, "I-22: memory's own answer waits for the store");
    else if (answer->status == StatusCode::kUnavailable) CheckUnavailable(answer->type, ns);
    if (waits || answer->status == StatusCode::kUnavailable) return;
  }
  if (both && !both->Lineage(ns).empty()) ++resumed_;
  const ModelAttempt* expected = known.Latest(ns);
  if (expected) {
    Require(latest.status == StatusCode::kOk, "I-6: there is a latest step, and the daemon says there is none");
    Require(Decode<AttemptInfo>(latest.body)->attempt == expected->key.AttemptId(), "I-6: latest is another step than the newest of the lineage");
  } else {
    Require(latest.status != StatusCode::kOk, "I-1: latest is something that is not complete");
    Require(latest.status == known.NothingLeft(ns), "I-31: never, lost and unknown are mixed up");
  }
  Require(listing.status == StatusCode::kOk, "I-31: the listing failed");
  std::set<Id128> complete;
  const Result<ListStepsReply> listed = Decode<ListStepsReply>(listing.body);
  Require(listed.has_value(), "I-40: the listing does not decode");
  for (const AttemptInfo& info : listed->attempts) {
    const ModelAttempt* a = known.Find(info.attempt);
    Require(a && a->ns == ns, "I-38: a listing names somebody else's step");
    Require(!a->tombstone, "I-16: a listing names a step that has a tombstone");
    if (info.state != AttemptState::kComplete) continue;
    Require(known.Complete(*a), "I-1: something is listed as complete that is not");
    complete.insert(info.attempt);
    Require(info.level == (a->durable ? Level::kDurable : Level::kMemory), "I-23: a step's level is not what was reached");
    CheckLevel(info.attempt, info.level);
  }
  for (const auto& [id, a] : known.attempts()) {
    if (a.ns != ns || !known.Complete(a) || complete.contains(id)) continue;
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
  const std::vector<Action> done = replayed.Restore(node_.now(), node_.LedgerContents(), node_.ExtentIds());
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
  // What a group of readers has agreed on is not in the ledger (their pins are): a restart may let go of what only the agreement kept.
  const bool let_go = std::any_of(done.begin(), done.end(), [](const Action& action) {
    const auto* append = std::get_if<action::Append>(&action);
    const auto* tombstone = append ? std::get_if<ledger::Tombstone>(&append->entry) : nullptr;
    return append && (std::holds_alternative<ledger::Evicted>(append->entry) || (tombstone && tombstone->why == ledger::TombstoneWhy::kRetired));
  });
  if (let_go) return;
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
  store_.Heal();
  for (int i = 0; i < 6; ++i) {
    DeliverAll();
    node_.Advance(1800 * kNanosPerSecond);
    node_.RunTimers();
  }
  DeliverAll();
  Require(!node_.drainer().IsRetaining(), "I-30: what was to go from the store is still there although the store has been healthy for hours");
  Audit();
  CheckAllDurable("I-30: a step that was asked for is not durable although the store has been healthy for hours");
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
  Require(pool["sealed"] == kept * node_.config().extent_bytes, "I-28: the pool counts other bytes than the listed steps have");
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
  node_.LoseKeeper();  // What is left then is what the store has.
  Audit();
}

}  // namespace sp::sim
