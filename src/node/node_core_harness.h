// For NodeCore's tests: a daemon without an operating system. Time is `now`, actions are carried out at once (or held back), and the ledger is the
// real one, so that a restart is a new NodeCore from its bytes.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/sha256.h"
#include "catalog/catalog.h"
#include "node/node_core.h"

namespace sp {

inline Id128 TestId(uint8_t n) {
  Id128 id;
  id.bytes.fill(n);
  return id;
}

class NodeCoreHarness {
 public:
  explicit NodeCoreHarness(uint32_t extents_max = 8, uint32_t retain = 2, std::string store = "") : memory_((uint64_t{1} << 20) / 8) {
    config.node = TestId(0xaa);
    config.boot = TestId(0xbb);
    config.version = "test";
    config.extent_bytes = 8192;
    config.extents_max = extents_max;
    config.retain = retain;
    config.store = std::move(store);
    OpenLedger();
    core = std::make_unique<NodeCore>(config);
    Execute(core->Restore(now, ledger->Read(), {}));
    Drain();
  }

  struct Client {
    ConnectionId connection = 0;
    Id128 session;
    uint32_t uid = 1000, pid = 0;
  };

  // --- connections
  Client Connect(uint8_t n, uint32_t uid = 1000) { return Reconnect({0, TestId(n), uid, uint32_t{100} + n}); }
  Client Reconnect(Client c) {
    c.connection = next_connection++;
    Step(event::Connected{c.connection, c.uid, c.pid, 7});
    HelloRequest hello;
    hello.session = c.session;
    EXPECT_EQ(StatusCode::kOk, Ask(c, MessageType::kHello, hello).status);
    return c;
  }
  void Disconnect(const Client& c) { Step(event::Disconnected{c.connection}); }
  void Die(const Client& c) {
    Disconnect(c);
    Step(event::SessionDied{c.session});
  }

  // --- requests
  template <typename T>
  Frame Ask(const Client& c, MessageType type, const T& body) {
    Frame f = MakeFrame(type, ++last_request, body);
    Step(event::Received{c.connection, f});
    return Reply(last_request);
  }
  Frame Reply(uint64_t request) const {  // kInternal: none yet.
    auto it = replies.find(request);
    return it == replies.end() ? Frame::Error(MessageType::kHello, request, Status(StatusCode::kInternal, "no reply yet")) : it->second;
  }
  template <typename T>
  static T Body(const Frame& f) {
    EXPECT_EQ(StatusCode::kOk, f.status) << AsText(f.body);
    auto body = Decode<T>(f.body);
    EXPECT_TRUE(body.has_value());
    return body ? *body : T{};
  }

  struct Writer {
    Client client;
    uint64_t generation = 0;
    Id128 nonce;
    uint32_t world_size = 1, rank = 0;
    std::string ns = "job";
  };
  Frame TryOpen(Writer& w, ParentMode mode = ParentMode::kLatest, Id128 parent = {}) {
    const Frame f = Ask(w.client, MessageType::kOpenGeneration, OpenGenerationRequest{w.ns, w.nonce, w.world_size, w.rank, mode, parent});
    if (f.status == StatusCode::kOk) w.generation = Decode<OpenGenerationReply>(f.body)->generation;
    return f;
  }
  Writer Open(const Client& c, uint8_t nonce, uint32_t world_size = 1, uint32_t rank = 0, ParentMode mode = ParentMode::kLatest, Id128 parent = {},
              std::string ns = "job") {
    Writer w{c, 0, TestId(nonce), world_size, rank, std::move(ns)};
    EXPECT_EQ(StatusCode::kOk, TryOpen(w, mode, parent).status);
    return w;
  }
  Frame TryReserve(const Writer& w, uint64_t step, uint32_t try_number = 0, uint64_t bytes = 8192, Nanos timeout = kNanosPerSecond) {
    return Ask(w.client, MessageType::kReserve,
               ReserveRequest{w.ns, w.generation, w.nonce, step, try_number, w.world_size, w.rank, bytes, static_cast<uint64_t>(timeout)});
  }
  ReserveReply Reserve(const Writer& w, uint64_t step, uint32_t try_number = 0, uint64_t bytes = 8192) {
    return Body<ReserveReply>(TryReserve(w, step, try_number, bytes));
  }
  SealRequest SealOf(const Writer& w, uint64_t lease, uint64_t length = 4096) const {
    SealRequest r;
    r.lease = lease;
    r.length_bytes = length;
    r.header_bytes = length - 4;  // As IndexOf says: four bytes are data.
    r.static_offset = 32;
    r.block_root.bytes.fill(static_cast<uint8_t>(lease));
    r.structure = StructureOf(w.world_size, w.rank);
    return r;
  }
  Frame TrySeal(const Writer& w, uint64_t lease) { return Ask(w.client, MessageType::kSeal, SealOf(w, lease)); }
  // One whole save by one rank; the attempt.
  Id128 Save(const Writer& w, uint64_t step, uint32_t try_number = 0) {
    const ReserveReply r = Reserve(w, step, try_number);
    EXPECT_EQ(StatusCode::kOk, TrySeal(w, r.lease).status);
    return r.attempt;
  }
  Frame TryLatest(const Client& c, std::string ns = "job", Level level = Level::kMemory) {
    return Ask(c, MessageType::kLatest, NamespaceRequest{std::move(ns), level, 0});
  }
  uint64_t LatestStep(const Client& c, std::string ns = "job") { return Body<AttemptInfo>(TryLatest(c, std::move(ns))).step; }
  std::vector<AttemptInfo> List(const Client& c, std::string ns = "job") {
    return Body<ListStepsReply>(Ask(c, MessageType::kListSteps, NamespaceRequest{std::move(ns), Level::kMemory, 0})).attempts;
  }
  std::vector<uint64_t> Steps(const Client& c, std::string ns = "job") {  // Complete ones.
    std::vector<uint64_t> steps;
    for (const AttemptInfo& i : List(c, std::move(ns))) {
      if (i.state == AttemptState::kComplete) steps.push_back(i.step);
    }
    return steps;
  }
  Frame TryRead(const Client& c, OpenReadRequest r = {}) {
    if (r.ns.empty()) r.ns = "job";
    return Ask(c, MessageType::kOpenRead, r);
  }
  Frame Abort(const Client& c, uint64_t lease) { return Ask(c, MessageType::kAbort, LeaseRequest{lease, "test"}); }
  Frame Wait(const Client& c, const Id128& attempt, Nanos timeout = kNanosPerSecond, Level level = Level::kMemory) {
    return Ask(c, MessageType::kWait, WaitRequest{"job", attempt, level, static_cast<uint64_t>(timeout)});
  }
  nlohmann::json StatusView(uint32_t uid = 1000) { return nlohmann::json::parse(core->StatusJson(now, uid, false)); }
  uint64_t PoolBytes(const char* what) { return StatusView()["pool"][what].get<uint64_t>() / 8192; }  // In extents.

  // --- time and faults
  void Advance(Nanos by) {
    now += by;
    for (int i = 0; i < 50; ++i) {
      const auto next = core->NextDeadline();
      if (!next || *next > now) return;
      Step(event::Tick{});
    }
    ADD_FAILURE() << "a deadline stays due";
  }
  // SIGKILL of the worker and its next incarnation. Sessions are reported dead as `dead` says.
  void Restart(const std::set<Id128>& dead = {}) {
    ++config.incarnation;
    kill_after = -1;
    killed = false;
    OpenLedger();
    core = std::make_unique<NodeCore>(config);
    dead_sessions = dead;
    Execute(core->Restore(now, ledger->Read(), {extents.begin(), extents.end()}));
    CheckCore();
    Drain();
  }
  // Another keeper: the memory is gone, the durable tier and the markers are not.
  void LoseMemory() {
    config.incarnation = 1;
    config.boot.bytes[0] ^= 1;
    std::fill(memory_.begin(), memory_.end(), 0);
    extents.clear();
    OpenLedger();
    core = std::make_unique<NodeCore>(config);
    Execute(core->Restore(now, ledger->Read(), {}));
    Drain();
  }
  // What was held back, now.
  void Release() {
    later.insert(later.end(), held.begin(), held.end());
    held.clear();
    Drain();
  }
  void Compact() { ASSERT_TRUE(ledger->Compact(core->Snapshot()).ok()); }
  static Hash256 StructureOf(uint32_t world_size, uint32_t rank) { return Sha256(AsBytes("s" + std::to_string(world_size) + " " + std::to_string(rank))); }

  void Step(const Event& e) {
    if (killed) return;
    Execute(core->Step(now, e));
    if (killed) return;
    CheckCore();
    while (!later.empty() && !killed) {
      const Event next = later.front();
      later.erase(later.begin());
      Step(next);
    }
  }
  void Drain() {
    while (!later.empty()) {
      const Event e = later.front();
      later.erase(later.begin());
      Step(e);
    }
  }
  void CheckCore() {
    const Status s = core->CheckInvariants();
    EXPECT_TRUE(s.ok()) << s.ToString();
  }

  CoreConfig config;
  std::unique_ptr<NodeCore> core;
  std::optional<Ledger> ledger;
  Nanos now = 1000 * kNanosPerSecond;
  std::set<uint32_t> extents;           // The keeper's.
  std::vector<Action> actions;          // All that were carried out.
  std::map<uint64_t, Frame> replies;    // By request id.
  std::vector<Event> held;              // Answers of jobs that a flag below holds back.
  bool hold_seal_checks = false, hold_extents = false;
  std::set<Hash256> unknown_structures; // Read from a shard, these turn out to be malformed.
  Status block_check;               // How the next CheckBlock ends.
  Status seal_check;                // How the next CheckSeal ends.
  Status store_status;              // How everything that is asked of the durable tier ends.
  Status manifest_status;           // How a manifest that is asked of it ends, where the tier itself answers.
  bool hold_store = false;          // Its answers.
  std::vector<StoredStep> stored;   // What it has: outlives this node's memory.
  Status newest_damaged;            // What a listing says of the newest.
  std::vector<Departure> departures;  // What its rule lets go.
  uint64_t undeletable = 0;           // A step.
  std::set<Id128> dead_sessions;
  int kill_after = -1;                  // SIGKILL after so many more ledger entries.
  bool killed = false;
  ConnectionId next_connection = 1;
  uint64_t last_request = 0;
  bool gap = false;                     // Shards that do not cover their tensor.

 private:
  void OpenLedger() {
    auto opened = Ledger::Open({reinterpret_cast<uint8_t*>(memory_.data()), memory_.size() * 8});
    ASSERT_TRUE(opened.has_value());
    ledger.emplace(*opened);
  }
  std::shared_ptr<PackedIndex> IndexOf(const Hash256& hash) const {
    for (uint32_t world = 1; world <= 4; ++world) {
      for (uint32_t rank = 0; rank < world; ++rank) {
        if (StructureOf(world, rank) != hash) continue;
        ShardIndex index;
        index.pieces.push_back({"w", "F32", {1}, {rank}, {gap ? world + 1 : world}, 0, 4});
        index.data_bytes = 4;
        return PackedIndex::Of(index);
      }
    }
    return nullptr;
  }
  void Answer(bool hold, Event e) { (hold ? held : later).push_back(std::move(e)); }
  void Execute(const std::vector<Action>& batch) {
    for (const Action& any : batch) {
      if (std::holds_alternative<action::Append>(any) && kill_after == 0) {
        killed = true;
        later.clear();
        return;
      }
      actions.push_back(any);
      if (const auto* a = std::get_if<action::Append>(&any)) {
        ASSERT_TRUE(ledger->Append(a->entry).ok());
        if (kill_after > 0) --kill_after;
      } else if (const auto* a = std::get_if<action::Send>(&any)) {
        replies[a->frame.request_id] = a->frame;
      } else if (const auto* a = std::get_if<action::WatchSession>(&any)) {
        if (dead_sessions.contains(a->session.session)) later.push_back(event::SessionDied{a->session.session});
      } else if (const auto* a = std::get_if<action::CheckSeal>(&any)) {
        event::SealChecked e{a->lease, seal_check, {}};
        if (e.status.ok() && a->want_structure) e.structure = IndexOf(a->structure);
        seal_check = {};
        Answer(hold_seal_checks, e);
      } else if (const auto* a = std::get_if<action::ReadStructure>(&any)) {
        const Status read = unknown_structures.contains(a->structure) ? Status(StatusCode::kProtocol, "malformed") : Status();
        Answer(false, event::StructureRead{a->record, read, read.ok() ? IndexOf(a->structure) : nullptr});
      } else if (const auto* a = std::get_if<action::CheckBlock>(&any)) {
        Answer(false, event::BlockChecked{a->token, block_check});
      } else if (const auto* a = std::get_if<action::StoreShard>(&any)) {
        Answer(hold_store, event::ShardStored{a->record.Identity(), store_status, false});
      } else if (const auto* a = std::get_if<action::StoreManifest>(&any)) {
        const Status ended = store_status.ok() ? manifest_status : store_status;
        if (ended.ok() && std::ranges::find(stored, a->step) == stored.end()) stored.push_back(a->step);
        Answer(hold_store, event::ManifestStored{a->attempt, ended});
      } else if (const auto* a = std::get_if<action::ListStore>(&any)) {
        event::StoreListed e{a->uid, a->ns, store_status, {}, newest_damaged};
        for (const StoredStep& step : stored) {
          const AttemptKey& key = step.records[0].key;
          if (store_status.ok() && key.uid == a->uid && key.ns == a->ns) e.steps.insert(e.steps.begin(), step);
        }
        Answer(hold_store, std::move(e));
      } else if (const auto* a = std::get_if<action::PlanRetention>(&any)) {
        event::RetentionPlanned e{a->uid, a->ns, store_status, {}};
        for (const Departure& departure : departures) {
          const auto is_it = [&](const StoredStep& s) { return s.records[0].attempt == departure.step.attempt; };
          if (store_status.ok() && std::ranges::any_of(stored, is_it)) e.departures.push_back(departure);
        }
        Answer(hold_store, std::move(e));
      } else if (const auto* a = std::get_if<action::DeleteSteps>(&any)) {
        event::StepsDeleted e{a->uid, a->ns, store_status, {}};
        for (const StepName& name : a->steps) {
          if (!store_status.ok() || name.step == undeletable) continue;
          std::erase_if(stored, [&](const StoredStep& s) { return s.records[0].attempt == name.attempt; });
          e.steps.push_back(name);
        }
        if (e.status.ok() && e.steps.size() < a->steps.size()) e.status = Status(StatusCode::kDenied, "403");
        Answer(hold_store, std::move(e));
      } else if (const auto* a = std::get_if<action::CreateExtents>(&any)) {
        for (uint32_t i = 0; i < a->count; ++i) {
          if (!hold_extents) extents.insert(a->first + i);
          EXPECT_LE(extents.size(), config.extents_max) << "I-27";
          Answer(hold_extents, event::ExtentCreated{a->first + i});
        }
      } else if (const auto* a = std::get_if<action::DropExtents>(&any)) {
        for (uint32_t e : a->extents) extents.erase(e);
      } else if (const auto* a = std::get_if<action::WriteMarker>(&any)) {
        config.markers.push_back(a->marker);
      }
    }
  }

  std::vector<Event> later;
  std::vector<uint64_t> memory_;
};

}  // namespace sp
