#include "client/fake_daemon.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/check.h"
#include "base/crc32c.h"
#include "base/sha256.h"
#include "os/memfd.h"
#include "os/system.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr Nanos kFar = 3600 * kNanosPerSecond;

AttemptKey KeyOf(const ReserveRequest& r) {
  return {static_cast<uint32_t>(::getuid()), r.ns, r.generation, r.nonce, r.step, r.try_number};
}

template <typename T>
T Must(Result<T> result) {
  if (!result) std::fprintf(stderr, "fake daemon: %s\n", result.error().ToString().c_str());
  SP_CHECK(result.has_value());
  return std::move(*result);
}

FakeDaemon::Answer Refuse(const Frame& f, StatusCode code, const std::string& why) {
  return {.frame = Frame::Error(f.type, f.request_id, Status(code, why))};
}

}  // namespace

FakeDaemon::FakeDaemon(std::string socket_path, uint64_t extent_bytes) : path_(std::move(socket_path)), extent_bytes_(extent_bytes) {}

void FakeDaemon::Start() {
  listener_ = Must(ListenUnix(path_, 0600));
  accepting_ = std::thread([this] { Accept(); });
}

void FakeDaemon::Stop() {
  if (!listener_.valid()) return;
  stop_ = true;
  ::shutdown(listener_.get(), SHUT_RDWR);  // Makes it readable.
  accepting_.join();
  stop_ = false;
  DropConnections();
  std::vector<std::thread> serving;
  {
    std::lock_guard lock(mutex_);
    serving.swap(serving_);
  }
  for (std::thread& thread : serving) thread.join();
  listener_.Reset();
}

void FakeDaemon::DropConnections() {
  std::lock_guard lock(mutex_);
  for (int fd : connections_) ::shutdown(fd, SHUT_RDWR);
}

void FakeDaemon::ReplaceMemory() {
  {
    std::lock_guard lock(mutex_);
    ++boot_.bytes[0];
    slots_.clear();
    idle_slots_.clear();
    leases_.clear();
    sealed_.reset();
    next_id_ = 100;  // The same ids again, for other things.
  }
  DropConnections();
}

void FakeDaemon::SetHook(MessageType type, Hook hook) {
  std::lock_guard lock(mutex_);
  hooks_[type] = std::move(hook);
}

std::vector<Frame> FakeDaemon::Seen(MessageType type) const {
  std::lock_guard lock(mutex_);
  std::vector<Frame> frames;
  for (const Frame& frame : seen_) {
    if (frame.type == type) frames.push_back(frame);
  }
  return frames;
}

void FakeDaemon::AwaitSeen(MessageType type, size_t count) {
  std::unique_lock lock(mutex_);
  SP_CHECK(seen_changed_.wait_for(lock, std::chrono::seconds(20), [&] {
    return static_cast<size_t>(std::count_if(seen_.begin(), seen_.end(), [&](const Frame& f) { return f.type == type; })) >= count;
  }));
}

size_t FakeDaemon::connections() const {
  std::lock_guard lock(mutex_);
  return connections_.size();
}

void FakeDaemon::Corrupt(uint64_t offset) {
  std::lock_guard lock(mutex_);
  const int fd = slots_.at(sealed_->slot)[offset / extent_bytes_].get();
  uint8_t byte = 0;
  SP_CHECK(PReadExact(fd, {&byte, 1}, offset % extent_bytes_).ok());
  byte ^= 1;
  SP_CHECK(PWriteExact(fd, {&byte, 1}, offset % extent_bytes_).ok());
}

std::vector<uint8_t> FakeDaemon::SlotBytes(uint64_t slot, uint64_t offset, uint64_t size) const {
  std::lock_guard lock(mutex_);
  std::vector<uint8_t> out(size);
  for (uint64_t i = 0; i < size;) {
    const uint64_t at = offset + i;
    const uint64_t n = std::min(size - i, extent_bytes_ - at % extent_bytes_);
    const int fd = slots_.at(slot)[at / extent_bytes_].get();
    SP_CHECK(PReadExact(fd, MutableByteSpan(out).subspan(i, n), at % extent_bytes_).ok());
    i += n;
  }
  return out;
}

void FakeDaemon::Accept() {
  for (;;) {
    const Result<bool> ready = WaitReadable(listener_.get(), kFar);
    SP_CHECK(ready.has_value());
    Result<Fd> accepted = AcceptUnix(listener_.get());
    if (stop_) return;
    if (!accepted) continue;
    std::lock_guard lock(mutex_);
    const int fd = accepted->Release();
    connections_.insert(fd);
    serving_.emplace_back([this, fd] { Serve(fd); });
  }
}

void FakeDaemon::Serve(int number) {
  Fd fd(number);
  std::vector<uint8_t> buffer(kFrameBytesMax);
  for (;;) {
    const auto message = ReceiveMessageBy(fd.get(), buffer, 0, MonotonicNow() + kFar);
    if (!message) break;
    const Result<Frame> request = Frame::Decode(ByteSpan(buffer).first(message->size_bytes));
    SP_CHECK(request.has_value());
    const Answer answer = Handle(*request);
    Status sent;
    if (!answer.garbage.empty()) sent = SendMessage(fd.get(), answer.garbage);
    else if (answer.frame) sent = SendMessage(fd.get(), answer.frame->Encode(), answer.fds);
    if (!sent.ok() || answer.close) break;
  }
  std::lock_guard lock(mutex_);
  connections_.erase(number);
  fd.Reset();
}

FakeDaemon::Answer FakeDaemon::Handle(const Frame& request) {
  Hook hook;
  {
    std::lock_guard lock(mutex_);
    seen_.push_back(request);
    if (auto found = hooks_.find(request.type); found != hooks_.end()) hook = found->second;
  }
  seen_changed_.notify_all();
  if (hook) {
    if (std::optional<Answer> answer = hook(request)) return std::move(*answer);
  }
  std::lock_guard lock(mutex_);
  return Model(request);
}

uint64_t FakeDaemon::MakeSlot(uint64_t bytes) {
  const uint64_t slot = next_id_++;
  for (uint64_t at = 0; at < bytes; at += extent_bytes_) {
    Fd fd = Must(CreateMemfd("fake", extent_bytes_));
    SP_CHECK(SealSize(fd.get()).ok());
    slots_[slot].push_back(std::move(fd));
  }
  return slot;
}

FakeDaemon::Answer FakeDaemon::Fetch(const Frame& f) {
  const auto r = Must(Decode<FetchExtentsRequest>(f.body));
  const uint64_t slot = r.read_only ? sealed_->slot : r.slot;
  const auto& all = slots_.at(slot);
  FetchExtentsReply reply{r.first, 0, static_cast<uint32_t>(all.size())};
  Answer answer;
  for (size_t i = r.first; i < all.size() && answer.fds.size() < kDescriptorsPerFrameMax; ++i) answer.fds.push_back(all[i].get());
  reply.count = static_cast<uint32_t>(answer.fds.size());
  answer.frame = MakeFrame(f.type, f.request_id, reply);
  return answer;
}

FakeDaemon::Answer FakeDaemon::Seal(const Frame& f) {
  const auto r = Must(Decode<SealRequest>(f.body));
  const auto lease = leases_.find(r.lease);
  if (lease == leases_.end()) return Refuse(f, StatusCode::kClosed, "no such lease");
  SealRecord record;
  record.key = KeyOf(lease->second.first);
  record.attempt = record.key.AttemptId();
  record.world_size = lease->second.first.world_size;
  record.rank = lease->second.first.rank;
  record.length_bytes = r.length_bytes;
  record.block_root = r.block_root;
  record.whole_crc = r.whole_crc;
  record.header_bytes = r.header_bytes;
  record.static_offset = r.static_offset;
  record.structure = r.structure;
  sealed_ = Shard{record, lease->second.second};
  leases_.erase(lease);
  return {.frame = MakeFrame(f.type, f.request_id, SealReply{record.Identity(), true})};
}

FakeDaemon::Answer FakeDaemon::Model(const Frame& f) {
  const auto reply = [&](const auto& body) { return Answer{.frame = MakeFrame(f.type, f.request_id, body)}; };
  const auto info = [&] {
    AttemptInfo i;
    i.attempt = sealed_->record.attempt;
    i.step = sealed_->record.key.step;
    i.world_size = 1;
    i.state = AttemptState::kComplete;
    i.level = Level::kMemory;
    return i;
  };
  switch (f.type) {
    case MessageType::kHello: {
      HelloReply hello;
      hello.boot = boot_;
      hello.extent_bytes = extent_bytes_;
      hello.lease_ns = lease_ns;
      hello.daemon_version = "fake";
      return reply(hello);
    }
    case MessageType::kOpenGeneration: return reply(OpenGenerationReply{.generation = 1});
    case MessageType::kPrepareSlots: {
      const auto r = Must(Decode<PrepareSlotsRequest>(f.body));
      PrepareSlotsReply slots;
      for (uint32_t i = 0; i < r.count; ++i) {
        const uint64_t slot = MakeSlot(r.bytes);
        idle_slots_.insert(slot);
        slots.slots.push_back({slot, static_cast<uint32_t>(slots_[slot].size())});
      }
      return reply(slots);
    }
    case MessageType::kReserve: {
      const auto r = Must(Decode<ReserveRequest>(f.body));
      uint64_t slot = 0;
      if (!idle_slots_.empty() && slots_[*idle_slots_.begin()].size() * extent_bytes_ >= r.bytes) {
        slot = *idle_slots_.begin();
        idle_slots_.erase(slot);
      } else {
        slot = MakeSlot(r.bytes);
      }
      const uint64_t lease = next_id_++;
      leases_[lease] = {r, slot};
      return reply(ReserveReply{lease, slot, static_cast<uint32_t>(slots_[slot].size()), KeyOf(r).AttemptId(), lease_ns,
                                std::exchange(gone_slots, {})});
    }
    case MessageType::kFetchExtents: return Fetch(f);
    case MessageType::kSeal: return Seal(f);
    case MessageType::kAbort: {
      const auto r = Must(Decode<LeaseRequest>(f.body));
      if (auto lease = leases_.find(r.lease); lease != leases_.end()) {
        idle_slots_.insert(lease->second.second);
        leases_.erase(lease);
      }
      return reply(Empty{});
    }
    case MessageType::kWait: return reply(WaitReply{Level::kMemory});
    case MessageType::kLatest:
      if (!sealed_) return Refuse(f, StatusCode::kNotFound, "never had a complete step");
      return reply(info());
    case MessageType::kOpenRead:
      if (!sealed_) return Refuse(f, StatusCode::kNotFound, "never had a complete step");
      return reply(OpenReadReply{next_id_++, pin_ns, info()});
    case MessageType::kShardInfo: {
      if (Must(Decode<ShardRequest>(f.body)).rank != 0) return Refuse(f, StatusCode::kNotFound, "no such rank");
      ShardInfoReply shard;
      shard.record.bytes = sealed_->record.Encode();
      shard.extents = static_cast<uint32_t>(slots_.at(sealed_->slot).size());
      return reply(shard);
    }
    case MessageType::kReportCorrupt: return reply(ReportCorruptReply{true});
    case MessageType::kStatus: return reply(StatusReply{"{}"});
    case MessageType::kListSteps: {
      ListStepsReply steps;
      steps.total = 3;  // In pages of two.
      for (uint32_t i = Must(Decode<NamespaceRequest>(f.body)).first; i < 3 && steps.attempts.size() < 2; ++i) {
        steps.attempts.emplace_back().step = i;
      }
      return reply(steps);
    }
    case MessageType::kListNamespaces: return reply(ListNamespacesReply{});
    case MessageType::kRenew:
    case MessageType::kUnpin:
    case MessageType::kPinStep:
    case MessageType::kBye:
    case MessageType::kMakeDurable: return reply(Empty{});
  }
  return Refuse(f, StatusCode::kInternal, "not in the model");
}

}  // namespace sp
