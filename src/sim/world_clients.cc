// What trainers and readers do: the client library's part of the protocol, one message at a time.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/sha256.h"
#include "sim/world.h"

namespace sp::sim {

template <typename T>
void World::Ask(size_t p, MessageType type, const T& body) {
  Process& process = processes_[p];
  process.awaiting = MakeFrame(type, process.next_request++, body);
  Put(p, *process.awaiting);
}

void World::Put(size_t p, Frame frame) {
  Process& process = processes_[p];
  process.sent[frame.request_id] = frame;
  if (process.sent.size() > 12) process.sent.erase(process.sent.begin());
  sockets_.at(process.connection).queue.push_back(std::move(frame));
}

uint32_t World::WordOf(const Id128& attempt, uint32_t rank, uint32_t index) const {
  uint64_t id = 0;
  for (size_t i = 0; i < 8; ++i) id = id << 8 | attempt.bytes[i];
  return static_cast<uint32_t>(Mix(id, uint64_t{rank} << 32 | index)) | 1;
}

// One tensor of W elements, one per rank; a bad one has a rank that holds its neighbour's element, or one that is too short.
Hash256 World::StructureOf(uint32_t world_size, uint32_t rank, bool bad) {
  const std::string name = "structure " + std::to_string(world_size) + " " + std::to_string(rank) + (bad ? " bad" : "");
  const Hash256 hash = Sha256(AsBytes(name));
  if (!structures_.contains(hash)) {
    ShardIndex index;
    const uint64_t global = bad ? world_size + 1 : world_size;  // One element too many: nobody has it.
    index.pieces.push_back({"w", "F32", {1}, {rank}, {global}, 0, 4});
    index.data_bytes = 4;
    structures_[hash] = std::move(index);
    model_.SetGoodCoverage(hash, !bad);
  }
  return hash;
}

void World::Step(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  if (process.connection == 0) {
    const ConnectionId c = next_connection_++;
    process.connection = c;
    sockets_[c] = Socket{p, {}, false};
    node_.Deliver(event::Connected{c, process.key.uid, process.key.pid, process.key.start_time});
    if (process.connection != c) return;  // The worker was killed meanwhile.
    HelloRequest hello;
    hello.session = process.key.session;
    Put(p, MakeFrame(MessageType::kHello, process.next_request++, hello));
    return DeliverFrom(c);
  }
  if (!sockets_.at(process.connection).queue.empty() && arg % 4 != 0) return DeliverFrom(process.connection);
  if (!process.greeted || process.awaiting) return;
  if (process.reader) StepReader(p, arg);
  else StepWriter(p, arg);
  if (process.connection != 0 && arg % 8 != 1 && !sockets_.at(process.connection).queue.empty()) DeliverFrom(process.connection);
}

void World::StepWriter(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  const Launch& launch = launches_[process.launch];
  Save& save = process.save;
  if (process.abort) {
    model_.WriterPromised(*process.abort);
    Ask(p, MessageType::kAbort, LeaseRequest{*process.abort, "too late"});
    process.abort.reset();
    return;
  }
  if (process.generation == 0) {
    return Ask(p, MessageType::kOpenGeneration,
               OpenGenerationRequest{launch.ns.ns, launch.nonce, launch.world_size, process.rank, launch.mode, launch.parent});
  }
  switch (save.phase) {
    case Save::Phase::kNone: return BeginSave(p, arg);
    case Save::Phase::kReserved: {
      const uint32_t have = static_cast<uint32_t>(process.slots[save.slot].size());
      if (have < save.extents) return Ask(p, MessageType::kFetchExtents, FetchExtentsRequest{false, save.slot, 0, 0, have});
      save.phase = Save::Phase::kMapped;
      return;
    }
    case Save::Phase::kMapped: {
      if (save.durable && !save.asked) {
        save.asked = true;
        return Ask(p, MessageType::kMakeDurable, MakeDurableRequest{launch.ns.ns, save.attempt});
      }
      const uint32_t count = ExtentsFor(save.length, node_.config().extent_bytes);
      for (uint32_t i = 0; i < count; ++i) {
        const MemoryRef& memory = process.slots[save.slot][i];
        memory->word = WordOf(save.attempt, process.rank, i);
      }
      save.phase = Save::Phase::kWritten;
      return;
    }
    case Save::Phase::kWritten: return SealNow(p, arg);
    case Save::Phase::kSealed:
      save.phase = Save::Phase::kNone;
      ++process.saves;
      process.tries = 0;
      if (arg % 4 != 0) {
        const Level level = config_.store && arg % 8 == 3 ? Level::kDurable : Level::kMemory;
        Ask(p, MessageType::kWait, WaitRequest{launch.ns.ns, save.attempt, level, 20 * kNanosPerSecond});
      }
      return;
  }
}

void World::BeginSave(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  const Launch& launch = launches_[process.launch];
  if (arg % 32 == 7) {
    return Ask(p, MessageType::kPrepareSlots, PrepareSlotsRequest{launch.ns.ns, node_.config().extent_bytes, uint64_t{5} * kNanosPerSecond, 1 + arg % 2});
  }
  process.save = Save{};
  Save& save = process.save;
  // Every rank walks through the same steps; now and then two are swapped (F81).
  const uint32_t n = process.saves % 6 == 4 ? process.saves + 1 : process.saves % 6 == 5 ? process.saves - 1 : process.saves;
  save.step = launch.first_step + 10 * n;
  save.try_number = process.tries;
  save.durable = (arg >> 5) % 4 == 1;
  const uint64_t size = 1 + Mix(launch.nonce.bytes[0], n) % config_.shard_extents_max;
  save.length = size * node_.config().extent_bytes - 4096;
  Ask(p, MessageType::kReserve,
      ReserveRequest{launch.ns.ns, process.generation, launch.nonce, save.step, save.try_number, launch.world_size, process.rank,
                     LeaseBytes(save.length), 5 * kNanosPerSecond});
}

void World::SealNow(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  const Launch& launch = launches_[process.launch];
  Save& save = process.save;
  if (arg % 32 == 2) {
    process.abort = save.lease;
    save.phase = Save::Phase::kNone;
    return SaveFailed(process, StatusCode::kClosed);
  }
  if (arg % 32 == 3) return Ask(p, MessageType::kRenew, LeaseRequest{save.lease, ""});
  std::vector<uint32_t> words;
  const uint32_t count = ExtentsFor(save.length, node_.config().extent_bytes);
  for (uint32_t i = 0; i < count; ++i) words.push_back(WordOf(save.attempt, process.rank, i));
  if (arg % 32 == 5) words[0] ^= 2;  // A checksum that is wrong (F8, F75).
  SealRequest seal;
  seal.lease = save.lease;
  seal.length_bytes = save.length;
  seal.header_bytes = save.length - 4;  // As the structure says: one element of four bytes is data.
  seal.static_offset = 32;
  seal.block_root = BlockRoot(words);
  seal.structure = StructureOf(launch.world_size, process.rank, launch.bad_coverage);
  if (arg % 64 == 6) seal.structure.bytes[0] ^= 1;  // A static part that does not parse.
  Ask(p, MessageType::kSeal, seal);
}

void World::StepReader(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  const Launch& launch = launches_[process.launch];
  Reading& reading = process.reading;
  if (reading.done) return Kill(p);
  if (reading.pin == 0) {
    OpenReadRequest r;
    r.ns = launch.ns.ns;
    if (arg % 2) r.nonce = launch.nonce, r.sequence = (arg >> 4) % 2;
    if (const ModelAttempt* latest = model_.Latest(launch.ns); latest && arg % 8 == 5) {
      r.choice = ReadChoice::kStep;
      r.step = latest->key.step;
    }
    return Ask(p, MessageType::kOpenRead, r);
  }
  if (reading.rank >= reading.info.world_size) {
    model_.PinGivenBack(reading.pin);
    reading.done = true;
    return Ask(p, MessageType::kUnpin, PinRequest{reading.pin});
  }
  if (!reading.record) return Ask(p, MessageType::kShardInfo, ShardRequest{reading.pin, reading.rank, 0});
  if (reading.from_store) return ReadStored(process);
  if (reading.memory.size() < reading.extents) {
    return Ask(p, MessageType::kFetchExtents,
               FetchExtentsRequest{true, 0, reading.pin, reading.rank, static_cast<uint32_t>(reading.memory.size())});
  }
  const size_t count = ExtentsFor(reading.record->length_bytes, node_.config().extent_bytes);
  if (RootOf(reading.memory, count) != reading.record->block_root) {
    // Corrupt, or recycled because our pin is over; the reader cannot tell, and must not return it (I-8).
    const auto pin = model_.pins().find(reading.pin);
    const bool pinned = pin != model_.pins().end() && pin->second.expires > node_.now();
    if (pinned && !scribbled_.contains(reading.record->Identity())) Fail("I-9: the bytes of a sealed, pinned shard changed");
    reading.memory.clear();
    reading.record.reset();
    const uint32_t rank = reading.rank;
    reading.rank = reading.info.world_size;
    return Ask(p, MessageType::kReportCorrupt, ShardRequest{reading.pin, rank, 0});
  }
  CheckReadBytes(process);
  reading.memory.clear();
  reading.record.reset();
  ++reading.rank;
}

void World::CheckReadBytes(Process& process) {
  const Reading& reading = process.reading;
  const size_t count = ExtentsFor(reading.record->length_bytes, node_.config().extent_bytes);
  for (uint32_t i = 0; i < count; ++i) {
    Require(reading.memory[i]->word == WordOf(reading.info.attempt, reading.rank, i), "I-4: verified bytes of another attempt, rank or place");
  }
  ++restores_;
}

void World::SayGoodbye(size_t p) {
  Process& process = processes_[p];
  model_.SessionGone(process.key.session);
  process.slots.clear();
  process.read_only.clear();
  process.reading = {};
  process.save = {};
  process.abort.reset();
  process.generation = 0;
  ++process.saves;
  sockets_.at(process.connection).queue.push_back(MakeFrame(MessageType::kBye, process.next_request++, Empty{}));
  process.sent.clear();
  Break(process.connection);
  // The next object in this process that saves is another session.
  process.key.session.bytes[15]++;
  process.sessions.push_back(process.key.session);
}

// --- answers ---------------------------------------------------------------------------------------------------------------------------------

void World::OnClosed(ConnectionId c) {
  if (c == audit_connection_) {
    audit_connection_ = 0;
    return;
  }
  if (sockets_.contains(c) && !sockets_.at(c).broken) Break(c);
}

void World::OnFrame(ConnectionId c, const Frame& frame, const std::vector<MemoryRef>& memory, bool read_only) {
  if (c == audit_connection_) {
    audit_reply_ = frame;
    return;
  }
  auto socket = sockets_.find(c);
  if (socket == sockets_.end()) return;
  const size_t p = socket->second.process;
  Process& process = processes_[p];
  if (!process.alive || process.connection != c) return;  // Nobody is there to read it.
  if (!memory.empty() && read_only) process.read_only.insert(process.read_only.end(), memory.begin(), memory.end());
  auto request = process.sent.find(frame.request_id);
  if (request == process.sent.end() || request->second.type != frame.type) return;
  const Frame asked = request->second;
  const bool awaited = process.awaiting && process.awaiting->request_id == frame.request_id;
  if (awaited) process.awaiting.reset();
  OnReply(p, asked, frame, memory, awaited);
}

// What a process's sessions keep idle is for its next save, whichever of them wrote it: ended ones, and those a restarted worker has not heard of.
void World::CheckNoSpace(size_t p, const Frame& reply) const {
  const Process& process = processes_[p];
  if (!reply.ToStatus().message().starts_with("a shard of")) return;  // No memory for another extent.
  const bool connected_twice = std::ranges::count_if(sockets_, [&](const auto& s) { return s.second.process == p; }) > 1;
  const auto pool = nlohmann::json::parse(node_.core().StatusJson(node_.now(), 0, true))["pool"];
  if (connected_twice || pool["pending"] != 0) return;
  uint64_t idle = 0;
  for (const auto& [id, slot] : model_.slots()) {
    if (slot.use == Use::kIdle && slot.entry.session.pid == process.key.pid) idle += slot.entry.extents.size();
  }
  Require(idle < ExtentsFor(process.save.length, node_.config().extent_bytes), "I-28: no space, and the process has enough in its idle slots");
  CheckGaveWay(process);
}

void World::SaveFailed(Process& process, StatusCode code) {
  process.save.phase = Save::Phase::kNone;
  if (code == StatusCode::kFenced) process.reader = process.reading.done = true;  // Must stop: it ends at its next step.
  if (process.tries < 1 && code == StatusCode::kNoSpace) {
    ++process.tries;
  } else {
    ++process.saves;
    process.tries = 0;
  }
}

void World::OnReply(size_t p, const Frame& request, const Frame& reply, const std::vector<MemoryRef>& memory, bool awaited) {
  Process& process = processes_[p];
  Save& save = process.save;
  const bool ok = reply.status == StatusCode::kOk;
  if (reply.status == StatusCode::kUnavailable) CheckUnavailable(request.type, launches_[process.launch].ns);
  switch (request.type) {
    case MessageType::kHello: {
      if (!ok) return;
      const Id128 boot = Decode<HelloReply>(reply.body)->boot;
      if (process.boot != boot) {
        process.generation = 0;
        process.save = {};
        process.awaiting.reset();
        process.abort.reset();
      }
      process.boot = boot;
      process.greeted = true;
      if (process.awaiting) Put(p, *process.awaiting);
      return;
    }
    case MessageType::kOpenGeneration: {
      if (!awaited) return;
      if (reply.status == StatusCode::kUnavailable) return;  // It asks again.
      if (!ok) return SaveFailed(process, StatusCode::kFenced);
      const auto r = *Decode<OpenGenerationReply>(reply.body);
      if (process.generation != 0) Require(process.generation == r.generation, "I-32: one launch, two generations");
      process.generation = r.generation;
      return;
    }
    case MessageType::kReserve: {
      if (!awaited) return;
      if (reply.status == StatusCode::kClosed && model_.CurrentGeneration(launches_[process.launch].ns) == 0) process.generation = 0;
      if (reply.status == StatusCode::kNoSpace) CheckNoSpace(p, reply);
      if (!ok) return SaveFailed(process, reply.status);
      const auto r = *Decode<ReserveReply>(reply.body);
      save.lease = r.lease;
      save.slot = r.slot;
      save.extents = r.extents;
      save.attempt = r.attempt;
      save.phase = Save::Phase::kReserved;
      Require(r.extents >= ExtentsFor(save.length, node_.config().extent_bytes), "I-27: fewer extents than asked for");
      return;
    }
    case MessageType::kFetchExtents: {
      if (process.reader) return awaited ? OnReadReply(p, request, reply, memory) : void();
      if (!awaited) return;
      if (!ok) return SaveFailed(process, reply.status);
      auto& mapped = process.slots[save.slot];
      mapped.insert(mapped.end(), memory.begin(), memory.end());
      return;
    }
    case MessageType::kSeal: {
      const uint64_t lease = Decode<SealRequest>(request.body)->lease;
      if (ok) {
        const auto r = *Decode<SealReply>(reply.body);
        const auto [it, first] = seal_replies_.emplace(lease, r.record);
        Require(first || it->second == r.record, "I-32: a repeated seal was answered differently");
        const ModelAttempt* a = nullptr;
        for (const auto& [id, attempt] : model_.attempts()) {
          for (const auto& [rank, shard] : attempt.shards) {
            if (shard.record.Identity() == r.record) a = &attempt;
          }
        }
        Require(a != nullptr, "I-5: a seal was acknowledged that is not in the ledger");
        if (r.complete) Require(a->manifest, "I-5: completeness was acknowledged that is not in the ledger");
        if (r.complete) ++acknowledged_;
      }
      if (!awaited || save.lease != lease) return;
      if (ok) {
        save.phase = Save::Phase::kSealed;
      } else {
        if (reply.status == StatusCode::kFenced || save.step % 20 == 0) process.abort = lease;
        SaveFailed(process, reply.status);
      }
      return;
    }
    case MessageType::kRenew:
      if (awaited && !ok && save.phase != Save::Phase::kNone) SaveFailed(process, reply.status);
      return;
    case MessageType::kWait: return OnWaitReply(*Decode<WaitRequest>(request.body), reply);
    case MessageType::kMakeDurable: return CheckWishAnswer(request, reply);
    case MessageType::kOpenRead:
    case MessageType::kShardInfo:
    case MessageType::kReportCorrupt:
    case MessageType::kUnpin: return awaited ? OnReadReply(p, request, reply, memory) : void();
    default: return;
  }
}

void World::CheckOpenRead(const Process& process, const OpenReadRequest& r, const Frame& reply) {
  const NamespaceKey& ns = launches_[process.launch].ns;
  const std::pair<Id128, uint32_t> group{r.nonce, r.sequence};
  const auto choice = choices_.find(group);
  const bool chosen = !r.nonce.is_zero() && choice != choices_.end() && choice->second.expires > node_.now();
  if (reply.status == StatusCode::kUnavailable) return;
  std::optional<Model> both;
  const Model& known = KnownOf(ns, both);
  const ModelAttempt* latest = known.Latest(ns);
  if (reply.status != StatusCode::kOk) {
    if (r.choice == ReadChoice::kLatest && r.nonce.is_zero()) {
      Require(latest == nullptr, "I-31: a restore found nothing although there is something");
      Require(reply.status == known.NothingLeft(ns), "I-31: never, lost and unknown are mixed up in a restore");
    }
    return;
  }
  const AttemptInfo info = Decode<OpenReadReply>(reply.body)->info;
  CheckLevel(info.attempt, info.level);
  const Id128 got = info.attempt;
  if (chosen) Require(got == choice->second.attempt, "I-7: two ranks of one restore got different steps");
  else if (r.choice == ReadChoice::kLatest && r.nonce.is_zero()) {  // With one, an answer that was lost may have chosen before.
    Require(latest && latest->key.AttemptId() == got, "I-6: a restore got another step than the newest of the lineage");
  }
}

void World::OnReadReply(size_t p, const Frame& request, const Frame& reply, const std::vector<MemoryRef>& memory) {
  Process& process = processes_[p];
  Reading& reading = process.reading;
  const bool ok = reply.status == StatusCode::kOk;
  switch (request.type) {
    case MessageType::kOpenRead: {
      const auto r = *Decode<OpenReadRequest>(request.body);
      CheckOpenRead(process, r, reply);
      if (!ok) {
        reading.done = true;
        return;
      }
      const auto opened = *Decode<OpenReadReply>(reply.body);
      reading.pin = opened.pin;
      reading.info = opened.info;
      if (!r.nonce.is_zero()) choices_[{r.nonce, r.sequence}] = Choice{opened.info.attempt, node_.now() + node_.config().pin_ns};
      return;
    }
    case MessageType::kShardInfo: {
      if (!ok) {
        reading.rank = reading.info.world_size;  // Corrupt, or the pin has ended: nothing to read.
        return;
      }
      const auto info = *Decode<ShardInfoReply>(reply.body);
      reading.record = *SealRecord::Decode(info.record.span());
      const ModelAttempt* a = model_.Find(reading.info.attempt);
      Require(a && a->shards.contains(reading.rank) && a->shards.at(reading.rank).record == *reading.record, "I-3: a reader got another record");
      reading.from_store = info.extents == 0;
      const bool quarantined = model_.quarantined().contains(reading.record->Identity());
      Require(reading.from_store || !quarantined, "I-12: a quarantined shard is served");
      reading.extents = ExtentsFor(reading.record->length_bytes, node_.config().extent_bytes);
      model_.PinUsed(reading.pin, node_.now() + node_.config().pin_ns);
      return;
    }
    case MessageType::kFetchExtents:
      if (!ok) reading.rank = reading.info.world_size;
      else reading.memory.insert(reading.memory.end(), memory.begin(), memory.end());
      return;
    case MessageType::kReportCorrupt:
      if (ok && Decode<ReportCorruptReply>(reply.body)->confirmed) {
        const uint32_t rank = Decode<ShardRequest>(request.body)->rank;
        const ModelAttempt* a = model_.Find(reading.info.attempt);
        Require(a && model_.quarantined().contains(a->shards.at(rank).record.Identity()), "I-12: a confirmed corruption is not in the ledger");
      }
      return;
    default: return;
  }
}

}  // namespace sp::sim
