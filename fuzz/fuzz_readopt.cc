// What a restarted worker makes of a damaged ledger (T-11): it starts, its bookkeeping holds, it serves, and its next restart works too.
//
// Input: first operations of three bytes that fill a ledger as a worker does, up to one whose first byte is 255; then damage to the ledger's memory
// (two bytes where, one byte what to flip), and in the last two bytes which of sixteen extents the keeper has lost.
#include <cstdio>
#include <set>

#include "fuzz.h"
#include "node/node_core.h"

namespace {

using namespace sp;

constexpr uint32_t kExtents = 16;
constexpr size_t kOperationsMax = 60;
constexpr size_t kLedgerBytes = 64 << 10;
constexpr uint8_t kDamageBegins = 255;

Id128 SmallId(uint8_t n) {
  Id128 id;
  id.bytes[0] = n;
  return id;
}

// One worker: its core, the keeper's extents and the log that it leaves.
class Worker {
 public:
  Worker(uint64_t incarnation, const Ledger::Contents& contents, std::set<uint32_t> extents) : extents_(std::move(extents)), log_(contents.entries) {
    config_.node.bytes[0] = config_.boot.bytes[0] = 1;
    config_.incarnation = incarnation;
    config_.extent_bytes = 8192;
    config_.extents_max = kExtents;
    core_.emplace(config_);
    Carry(core_->Restore(now_, contents, {extents_.begin(), extents_.end()}));
  }
  void Step(const Event& event) {
    Carry(core_->Step(now_, event));
    for (size_t n = 0; n < jobs_.size(); ++n) {
      SP_CHECK(n < 1000);
      const Event next = std::move(jobs_[n]);
      Carry(core_->Step(now_, next));
    }
    jobs_.clear();
  }
  template <typename T>
  Frame Ask(ConnectionId c, MessageType type, const T& body) {
    reply_.reset();
    Step(event::Received{c, MakeFrame(type, 1, body)});
    return reply_.value_or(Frame());
  }
  void Leap(Nanos by) {
    now_ += by;
    for (int i = 0; core_->NextDeadline().value_or(now_ + 1) <= now_; ++i) {
      SP_CHECK(i < 200);  // I-30: no deadline stays due.
      Step(event::Tick{});
    }
  }
  const NodeCore& core() const { return *core_; }
  const std::set<uint32_t>& extents() const { return extents_; }
  const std::vector<LedgerEntry>& log() const { return log_; }

 private:
  void Carry(const std::vector<Action>& actions) {
    const Status status = core_->CheckInvariants();
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
    SP_CHECK(status.ok());
    for (const Action& any : actions) {
      if (const auto* a = std::get_if<action::Append>(&any)) {
        log_.push_back(a->entry);
      } else if (const auto* a = std::get_if<action::Send>(&any)) {
        SP_CHECK(a->frame.Encode().size() <= kFrameBytesMax);
        for (uint32_t e : a->extents) SP_CHECK(extents_.contains(e));  // Only what the keeper has can be sent.
        reply_ = a->frame;
      } else if (const auto* a = std::get_if<action::CheckSeal>(&any)) {
        for (uint32_t e : a->extents) SP_CHECK(extents_.contains(e));
        jobs_.push_back(event::SealChecked{a->lease, {}, a->want_structure ? Index(a->length_bytes - a->header_bytes) : nullptr});
      } else if (const auto* a = std::get_if<action::ReadStructure>(&any)) {
        for (uint32_t e : a->extents) SP_CHECK(extents_.contains(e));
        jobs_.push_back(event::StructureRead{a->record, {}, Index(4)});
      } else if (const auto* a = std::get_if<action::CheckBlock>(&any)) {
        for (uint32_t e : a->extents) SP_CHECK(extents_.contains(e));
        jobs_.push_back(event::BlockChecked{a->token, Status(StatusCode::kCorrupt, "differs")});
      } else if (const auto* a = std::get_if<action::CreateExtents>(&any)) {
        for (uint32_t i = 0; i < a->count; ++i) {
          SP_CHECK(extents_.insert(a->first + i).second && extents_.size() <= kExtents);
          jobs_.push_back(event::ExtentCreated{a->first + i});
        }
      } else if (const auto* a = std::get_if<action::DropExtents>(&any)) {
        for (uint32_t e : a->extents) SP_CHECK(extents_.erase(e) == 1);
      }
    }
  }
  static std::shared_ptr<PackedIndex> Index(uint64_t data_bytes) {
    ShardIndex index;
    index.pieces.push_back({"w", "F32", {1}, {0}, {1}, 0, 4});
    index.data_bytes = data_bytes;
    return PackedIndex::Of(index);
  }

  CoreConfig config_;
  std::optional<NodeCore> core_;
  std::set<uint32_t> extents_;
  std::vector<LedgerEntry> log_;
  std::vector<Event> jobs_;
  std::optional<Frame> reply_;
  Nanos now_ = kNanosPerSecond;
};

void Serve(Worker& worker) {
  worker.Step(event::Connected{1, 1000, 900, 5});
  HelloRequest hello;
  hello.session = SmallId(9);
  SP_CHECK(worker.Ask(1, MessageType::kHello, hello).status == StatusCode::kOk);
  for (const char* ns : {"job", "other"}) {
    const Frame latest = worker.Ask(1, MessageType::kLatest, NamespaceRequest{ns, Level::kMemory, 0});
    const Frame listing = worker.Ask(1, MessageType::kListSteps, NamespaceRequest{ns, Level::kMemory, 0});
    SP_CHECK(Decode<ListStepsReply>(listing.body).has_value());
    OpenReadRequest open;
    open.ns = ns;
    const Frame opened = worker.Ask(1, MessageType::kOpenRead, open);
    SP_CHECK((opened.status == StatusCode::kOk) == (latest.status == StatusCode::kOk));
    if (opened.status == StatusCode::kOk) {
      const auto pin = *Decode<OpenReadReply>(opened.body);
      SP_CHECK(pin.info.attempt == Decode<AttemptInfo>(latest.body)->attempt);
      for (uint32_t rank = 0; rank < pin.info.world_size; ++rank) {
        const Frame shard = worker.Ask(1, MessageType::kShardInfo, ShardRequest{pin.pin, rank, 0});
        if (shard.status != StatusCode::kOk) continue;
        const auto record = SealRecord::Decode(Decode<ShardInfoReply>(shard.body)->record.span());
        SP_CHECK(record && record->attempt == pin.info.attempt && record->rank == rank);  // I-4: no other shard than the one asked for.
        worker.Ask(1, MessageType::kFetchExtents, FetchExtentsRequest{true, 0, pin.pin, rank, 0});
      }
      worker.Ask(1, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0});
      worker.Ask(1, MessageType::kUnpin, PinRequest{pin.pin});
    }
    const Frame generation = worker.Ask(1, MessageType::kOpenGeneration, OpenGenerationRequest{ns, SmallId(7), 1, 0, ParentMode::kLatest, {}});
    if (generation.status != StatusCode::kOk) continue;
    const uint64_t number = Decode<OpenGenerationReply>(generation.body)->generation;
    const Frame reserved = worker.Ask(1, MessageType::kReserve, ReserveRequest{ns, number, SmallId(7), 1000, 0, 1, 0, 8192, 0});
    if (reserved.status != StatusCode::kOk) continue;
    SealRequest seal;
    seal.lease = Decode<ReserveReply>(reserved.body)->lease;
    seal.length_bytes = 4096, seal.header_bytes = 4092, seal.static_offset = 32;
    worker.Ask(1, MessageType::kSeal, seal);
  }
  worker.Leap(100 * kNanosPerSecond);
  worker.Leap(2000 * kNanosPerSecond);
}

// The worker's life before the kill.
class Life {
 public:
  explicit Life(Worker& worker) : worker_(worker) {}
  void Step(uint8_t kind, uint8_t a, uint8_t b) {
    const ConnectionId c = 10 + a % 4;
    const std::string ns = b % 8 == 7 ? "other" : "job";
    if (!connected_.contains(c)) Connect(c);
    switch (kind % 11) {
      case 0: {
        const uint8_t nonce = static_cast<uint8_t>(1 + b % 3);
        const auto mode = static_cast<ParentMode>(b / 3 % 3);
        const Frame f = worker_.Ask(c, MessageType::kOpenGeneration, OpenGenerationRequest{ns, SmallId(nonce), World(a), Rank(a), mode, attempt_});
        if (f.status == StatusCode::kOk) generation_ = Decode<OpenGenerationReply>(f.body)->generation, nonce_ = nonce;
        break;
      }
      case 1:
      case 2: {
        const uint64_t step = uint64_t{10} * (b % 6);
        const uint64_t bytes = b % 5 == 4 ? 20000 : 8192;
        const Frame f = worker_.Ask(c, MessageType::kReserve, ReserveRequest{ns, generation_, SmallId(nonce_), step, b / 64u, World(a), Rank(a), bytes, 0});
        if (f.status != StatusCode::kOk) break;
        const auto r = *Decode<ReserveReply>(f.body);
        leases_.emplace_back(c, r.lease);
        attempt_ = r.attempt;
        if (kind % 11 == 1) Seal(leases_.back());
        break;
      }
      case 3:
        if (!leases_.empty()) Seal(leases_[b % leases_.size()]);
        break;
      case 4:
        if (!leases_.empty()) {
          const auto& [owner, lease] = leases_[b % leases_.size()];
          if (connected_.contains(owner)) worker_.Ask(owner, MessageType::kAbort, LeaseRequest{lease, "enough"});
        }
        break;
      case 5: {
        OpenReadRequest open;
        open.ns = ns;
        if (b % 2) open.nonce = SmallId(nonce_);
        const Frame f = worker_.Ask(c, MessageType::kOpenRead, open);
        if (f.status == StatusCode::kOk) pin_ = Decode<OpenReadReply>(f.body)->pin;
        break;
      }
      case 6: worker_.Ask(c, b % 2 ? MessageType::kUnpin : MessageType::kReportCorrupt, ShardRequest{pin_, 0, 0}); break;
      case 7: worker_.Ask(c, MessageType::kPinStep, PinStepRequest{ns, attempt_, b % 2 == 0}); break;
      case 8:
        connected_.erase(c);
        worker_.Step(event::Disconnected{c});
        if (b % 2) worker_.Step(event::SessionDied{SmallId(static_cast<uint8_t>(c))});
        break;
      case 9: worker_.Ask(c, MessageType::kBye, Empty{}); break;
      default: worker_.Leap((b % 4 == 3 ? 700 : 30) * kNanosPerSecond); break;
    }
  }

 private:
  static uint32_t World(uint8_t a) { return 1 + a / 4 % 3; }
  static uint32_t Rank(uint8_t a) { return a / 12 % World(a); }
  void Connect(ConnectionId c) {
    connected_.insert(c);
    worker_.Step(event::Connected{c, 1000 + static_cast<uint32_t>(c % 4 == 3), static_cast<uint32_t>(100 + c), 5});
    HelloRequest hello;
    hello.session = SmallId(static_cast<uint8_t>(c));
    worker_.Ask(c, MessageType::kHello, hello);
  }
  void Seal(const std::pair<ConnectionId, uint64_t>& lease) {
    if (!connected_.contains(lease.first)) return;
    SealRequest seal;
    seal.lease = lease.second;
    seal.length_bytes = 4096, seal.header_bytes = 4092, seal.static_offset = 32;
    worker_.Ask(lease.first, MessageType::kSeal, seal);
  }

  Worker& worker_;
  std::set<ConnectionId> connected_;
  std::vector<std::pair<ConnectionId, uint64_t>> leases_;
  uint64_t generation_ = 0, pin_ = 0;
  uint8_t nonce_ = 0;
  Id128 attempt_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint16_t lost = 0;
  if (size >= 2) {
    lost = static_cast<uint16_t>(data[size - 1] << 8 | data[size - 2]);
    size -= 2;
  }
  fuzz::Numbers in({data, size});
  Worker before(1, {}, {});
  Life life(before);
  for (size_t n = 0; n < kOperationsMax && !in.done(); ++n) {
    const uint8_t kind = in.U8();
    if (kind == kDamageBegins) break;
    const uint8_t a = in.U8();
    life.Step(kind, a, in.U8());
  }
  std::vector<uint64_t> words(kLedgerBytes / 8);
  const MutableByteSpan memory(reinterpret_cast<uint8_t*>(words.data()), kLedgerBytes);
  Ledger ledger = Ledger::Open(memory).value();
  const bool compacted = lost & 1;  // Id 0 is never used.
  const std::vector<LedgerEntry> entries = compacted ? before.core().Snapshot() : before.log();
  for (const LedgerEntry& entry : entries) SP_CHECK(ledger.Append(entry).ok());
  while (!in.done()) {
    const size_t at = in.U16() % (Ledger::kHeaderBytes + ledger.used_bytes());
    memory[at] ^= in.U8();
  }
  const auto found = Ledger::Open(memory);
  if (!found) return 0;  // The daemon refuses to start: I-35.
  const Ledger::Contents contents = found->Read();
  std::set<uint32_t> extents = before.extents();
  std::erase_if(extents, [&](uint32_t id) { return id < 16 && (lost >> id & 1) && contents.damaged_entries > 0; });

  Worker first(2, contents, extents);
  // As after a kill at once, after a compaction, and after it has served.
  std::vector<LedgerEntry> again = contents.entries;
  again.insert(again.end(), first.log().begin(), first.log().end());
  { Worker killed(3, {again, contents.damaged_entries}, first.extents()); }
  { Worker other(3, {first.core().Snapshot(), 0}, first.extents()); }
  Serve(first);
  Worker last(4, {first.core().Snapshot(), 0}, first.extents());
  Serve(last);
  (void)last.core().StatusJson(kNanosPerSecond, 0, true);
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  const Input open = {0, 0, 0}, save = {1, 0, 1}, next = {1, 0, 2}, third = {1, 0, 3};
  const auto all = [](std::initializer_list<Input> parts, const Input& damage = {}) {
    Input input;
    for (const Input& part : parts) input.insert(input.end(), part.begin(), part.end());
    input.push_back(kDamageBegins);
    input.insert(input.end(), damage.begin(), damage.end());
    input.insert(input.end(), {0, 0});
    return input;
  };
  std::vector<Input> seeds = {
      {},
      all({open, save}),
      all({open, save, next, third}),                                // The first one is retired.
      all({open, save, {5, 1, 0}, next, third}),                     // Not while it is read.
      all({open, save, {7, 0, 0}, next, third}),                     // Nor while it is pinned.
      all({open, save, {5, 1, 0}, {6, 1, 0}}),                       // Found corrupt.
      all({open, {2, 0, 1}}),                                        // A lease is open.
      all({open, {2, 0, 1}, {8, 0, 1}}),                             // Its writer died.
      all({open, {2, 0, 1}, {10, 0, 3}}),                            // It expired and the writer lives.
      all({open, {2, 0, 1}, {10, 0, 3}, {4, 0, 0}}),                 // And gave up later.
      all({open, {2, 0, 1}, {9, 0, 0}}),                             // And said goodbye.
      all({{0, 4, 0}, {1, 4, 1}, {0, 17, 0}, {1, 17, 1}}),           // Two ranks.
      all({{0, 4, 0}, {1, 4, 1}}),                                   // One of two.
      all({open, save, {0, 0, 1}, next, {0, 0, 5}, third}),          // Generations.
      all({open, save, {0, 3, 0}, {1, 3, 1}, {5, 3, 0}}),            // Two identities.
  };
  for (const uint8_t where : {0, 100, 200}) {
    for (const uint8_t page : {16, 17, 18}) seeds.push_back(all({open, save, next, {2, 0, 4}, {5, 1, 1}}, {where, page, 0x41}));
  }
  seeds.push_back(all({open, save}, {24, 0, 1}));  // The commit word.
  return seeds;
}
