// The durable tier in a history: what goes wrong with the store, and what must be true of it all the same (I-22 to I-24).
#include <algorithm>

#include "sim/world.h"

namespace sp::sim {

void World::RunDurable(const Op& op) {
  const uint32_t more = op.arg >> 8;
  switch (op.kind) {
    case OpKind::kStore: {
      static constexpr StoreHealth kNext[] = {StoreHealth::kRefuses, StoreHealth::kHangs, StoreHealth::kUp, StoreHealth::kUp};
      store_.SetHealth(kNext[op.arg % 4]);
      break;
    }
    case OpKind::kStoreFault: {
      static constexpr StoreFault kFaults[] = {StoreFault::kFails, StoreFault::kAnswerLost, StoreFault::kArrivesLate, StoreFault::kFlipsStored,
                                               StoreFault::kFlipsRead};
      const size_t which = op.arg % 8;
      if (which < std::size(kFaults)) store_.SpoilNext(kFaults[which], 1 + more % 3);
      else if (which == 7) store_.DropLate();
      else store_.DeliverLate();
      break;
    }
    case OpKind::kWish: {
      std::vector<const ModelAttempt*> complete;
      for (const auto& [id, a] : model_.attempts()) {
        if (model_.Complete(a)) complete.push_back(&a);
      }
      if (complete.empty() || node_.stopping()) break;
      const ModelAttempt& a = *complete[more % complete.size()];
      const MakeDurableRequest request{a.ns.ns, a.key.AttemptId()};
      const Frame asked = MakeFrame(MessageType::kMakeDurable, 2, request);
      CheckWishAnswer(asked, AskDirectly(a.ns.uid, asked.type, asked.body));
      break;
    }
    default: node_.Terminate(); break;
  }
}

const Model& World::KnownOf(const NamespaceKey& ns, std::optional<Model>& both) const {
  if (!config_.store || model_.IsMine(ns)) return model_;
  both = model_;
  for (const StoredStep& step : store_.Steps(ns)) both->TakeOver(step);
  return *both;
}

// A generation that a step in the store was written by, or continues, came from there. Any other one is opened here, and must go on from all of them.
bool World::TakenOver(const LedgerEntry& entry) {
  const auto* opened = std::get_if<ledger::Generation>(&entry);
  if (!opened) return false;
  const NamespaceKey ns{opened->uid, opened->ns};
  uint64_t newest = 0;
  for (const StoredStep& step : store_.Steps(ns)) {
    newest = std::max(newest, step.lineage.front().generation);
    if (model_.IsMine(ns) || std::find(step.lineage.begin(), step.lineage.end(), *opened) == step.lineage.end()) continue;
    model_.TakeOver(*opened);
    return true;
  }
  Require(opened->generation > newest, "I-21: a generation is opened again that a step in the store is of");
  return false;
}

void World::CheckStored(const LedgerEntry& entry) const {
  if (const auto* shard = std::get_if<ledger::StoredShard>(&entry)) {
    Require(store_.HasShard(*SealRecord::Decode(shard->record.span())), "I-23: a shard counts as stored that the store does not have, or not whole");
  } else if (const auto* manifest = std::get_if<ledger::StoredManifest>(&entry)) {
    CheckLevel(SealRecord::Decode(manifest->record.span())->attempt, Level::kDurable);
  } else if (const auto* wish = std::get_if<ledger::DurableWish>(&entry); wish && !wish->on) {
    CheckGivenUp(*wish);
  }
}

// Only when the store was in trouble, or memory itself is damaged.
void World::CheckGivenUp(const ledger::DurableWish& wish) const {
  const ModelAttempt* a = model_.Find(wish.attempt);
  Require(a != nullptr, "I-23: an unknown step was given up");
  const bool damaged = std::any_of(a->shards.begin(), a->shards.end(), [&](const auto& s) { return scribbled_.contains(s.second.record.Identity()); });
  const bool excused = damaged || node_.drainer().IsInTrouble(node_.now(), wish.attempt);
  Require(excused, "I-23: a step was given up although neither the store nor memory was in trouble");
}

bool World::IsChosen(const Id128& attempt) const {
  return std::ranges::any_of(choices_, [&](const auto& c) { return c.second.attempt == attempt && c.second.expires > node_.now(); });
}

// What is not there whole are the remains of a deletion: of it the node knows nothing that it could offer, read or write.
void World::OnDeleting(const action::DeleteSteps& order) {
  const std::vector<StoredStep> stored = store_.AllSteps({order.uid, order.ns});
  for (const StepName& step : order.steps) {
    const auto place = std::ranges::find_if(stored, [&](const StoredStep& s) { return s.records.front().attempt == step.attempt; });
    Require(place == stored.end() || place - stored.begin() >= static_cast<ptrdiff_t>(config_.durable_keeps), "I-14: one of the newest steps is deleted");
    Require(place != stored.end() || !store_.IsWhole(step.attempt), "I-38: another user's step is deleted");
    Require(!IsChosen(step.attempt), "I-17: a step is deleted that a group of readers has chosen");
    const ModelAttempt* a = model_.Find(step.attempt);
    if (!a) continue;
    Require(!a->HasMemory(), "I-14: a step is deleted that memory has");
    Require(!a->operator_pin, "I-17: a step is deleted that an operator has pinned");
    Require(a->tombstone.has_value(), "I-5: a step is deleted that is offered, or on its way to the store");
    for (const auto& [pin, read] : model_.pins()) Require(read.entry.attempt != step.attempt, "I-17: a step is deleted that is being restored");
  }
}

void World::CheckLevel(const Id128& attempt, Level level) const {
  Require(level != Level::kDurable || store_.IsWhole(attempt), "I-23: a step is called durable that the store does not have whole");
}

void World::CheckUnavailable(MessageType type, const NamespaceKey& ns) const {
  if (node_.stopping()) return;
  switch (type) {
    case MessageType::kMakeDurable: return Require(!config_.store, "I-31: the durable tier is said to be missing");
    case MessageType::kLatest:
    case MessageType::kListSteps:
    case MessageType::kOpenRead:
    case MessageType::kOpenGeneration:
      return Require(config_.store && node_.drainer().IsUnlistable(node_.now(), ns), "I-29: unavailable although the store answers");
    default: Fail("I-22: trouble with the store reached what needs memory only");
  }
}

// I-22, F70: a save found no memory. Of a step that the store does not take, and that nothing else keeps, this process could have had it.
void World::CheckGaveWay(const Process& process) const {
  for (const auto& [id, a] : model_.attempts()) {
    if (a.ns.uid != process.key.uid || !a.manifest || !a.WantsDurable() || a.was_given_up) continue;
    const bool helps = std::any_of(a.shards.begin(), a.shards.end(), [&](const auto& s) {
      return s.second.here && model_.slots().at(s.second.slot).entry.session.session == process.key.session;
    });
    if (!helps || model_.WhyKept(a) || !node_.drainer().IsInTrouble(node_.now(), id)) continue;
    const bool chosen = std::any_of(choices_.begin(), choices_.end(), [&](const auto& c) { return c.second.attempt == id; });
    Require(chosen, "I-22: a save was refused for a step that the store does not take");
  }
}

void World::CheckAllDurable(const char* when) const {
  for (const auto& [id, a] : model_.attempts()) Require(a.tombstone || !a.manifest || !a.WantsDurable(), when);
}

void World::OnExit() { CheckAllDurable("I-30: the daemon ended, within its grace, before what was asked for was durable (F12)"); }

void World::CheckWishAnswer(const Frame& request, const Frame& reply) const {
  const ModelAttempt* a = model_.Find(Decode<MakeDurableRequest>(request.body)->attempt);
  if (reply.status == StatusCode::kUnavailable) return CheckUnavailable(request.type, {});
  if (reply.status == StatusCode::kOk) {
    Require(a && (a->wish || a->durable), "I-5: a wish was acknowledged that is not in the ledger");
  } else {
    Require(!a || a->tombstone, "I-22: a step may not be asked to be durable although it is there");
  }
}

void World::OnWaitReply(const WaitRequest& request, const Frame& reply) {
  const ModelAttempt* a = model_.Find(request.attempt);
  if (reply.status == StatusCode::kOk) {
    const Level level = Decode<WaitReply>(reply.body)->level;
    const bool let_go = a && a->durable && a->tombstone && config_.durable_keeps > 0;  // It was there, until the rule let go of it.
    if (!let_go) CheckLevel(request.attempt, level);
    if (request.level == Level::kDurable) Require(level == Level::kDurable, "I-23: Wait told of less than was waited for");
    // Retired in the same moment is possible: a step that came out of order (F81).
    if (level != Level::kNone) {
      Require(a && (model_.Complete(*a) || a->tombstone == ledger::TombstoneWhy::kRetired), "I-5: Wait told of a level that is not there");
    }
    if (a) Require(a->manifest, "I-5: Wait told of completeness that is not in the ledger");
    ++acknowledged_;
  } else if (request.level == Level::kDurable && a && model_.Complete(*a)) {
    const bool refused = reply.status == StatusCode::kClosed || reply.status == StatusCode::kInvalidArgument;
    Require(!refused || !a->WantsDurable(), "I-31: a step that is on its way to the store is said to be given up");
  }
}

// The client's part: it reads what the daemon's memory does not have from the store, and believes its bytes no more than memory's.
void World::ReadStored(Process& process) {
  Reading& reading = process.reading;
  const SealRecord& record = *reading.record;
  const auto pin = model_.pins().find(reading.pin);
  const bool let_go = config_.durable_keeps > 0 && (pin == model_.pins().end() || pin->second.entry.attempt != record.attempt);  // Its pin is over.
  if (!let_go) Require(store_.IsWhole(record.attempt) && store_.HasShard(record), "I-23: a reader was sent to a store that does not have the shard");
  const auto there = store_.health() == StoreHealth::kHangs ? Error(StatusCode::kDeadline, "") : store_.Read(ShardObjectKey(record));
  if (!there || BlockRoot(there->words) != record.block_root) {
    reading.rank = reading.info.world_size;  // The restore fails, as an error.
  } else {
    for (uint32_t i = 0; i < there->words.size(); ++i) {
      Require(there->words[i] == WordOf(reading.info.attempt, reading.rank, i), "I-4: verified bytes of another attempt, rank or place");
    }
    ++restores_;
    ++reading.rank;
  }
  reading.record.reset();
}

}  // namespace sp::sim
