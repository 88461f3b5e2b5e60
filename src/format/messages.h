// The socket protocol between a client and the daemon (docs/formats/socket.md). Pure.
//
// Transport: AF_UNIX SOCK_SEQPACKET, one frame per message: 24-byte header, then a body of at most kFrameBytesMax - 24 bytes. The client sends
// requests, the daemon answers each with the same type and request id: status 0 and the reply body, or an error status and its text.
// Descriptors travel daemon to client only, in the reply to FetchExtents. Requests are idempotent: after a lost reply the client reconnects
// with the same session id and repeats the request.
#pragma once

#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "format/constants.h"
#include "format/seal_record.h"
#include "format/wire.h"

namespace sp {

inline constexpr uint16_t kProtocolVersion = 1;

enum class MessageType : uint16_t {
  kHello = 1,
  kOpenGeneration = 2,
  kPrepareSlots = 3,
  kReserve = 4,
  kFetchExtents = 5,
  kSeal = 6,
  kAbort = 7,
  kRenew = 8,
  kWait = 9,
  kLatest = 10,
  kListSteps = 11,
  kListNamespaces = 12,
  kOpenRead = 13,
  kShardInfo = 14,
  kUnpin = 15,
  kPinStep = 16,
  kReportCorrupt = 17,
  kStatus = 18,
  kBye = 19,
  kMakeDurable = 20,
};
inline constexpr MessageType kMessageTypeLast = MessageType::kMakeDurable;

struct Frame {
  static constexpr size_t kHeaderBytes = 24;
  static constexpr uint32_t kMagic = 0x31465053;  // "SPF1"

  uint16_t version = kProtocolVersion;
  MessageType type = MessageType::kHello;
  uint64_t request_id = 0;
  StatusCode status = StatusCode::kOk;  // Requests: kOk. Replies: the outcome.
  std::vector<uint8_t> body;

  std::vector<uint8_t> Encode() const;
  // kProtocol: bad magic, unknown version (Hello of any version is let through), unknown type, lengths that contradict.
  static Result<Frame> Decode(ByteSpan bytes);
  static Frame Error(MessageType type, uint64_t request_id, const Status& status);
  Status ToStatus() const;  // The error of a reply, or OK.
};

template <typename T>
Frame MakeFrame(MessageType type, uint64_t request_id, const T& body) {
  return Frame{kProtocolVersion, type, request_id, StatusCode::kOk, Encode(body)};
}

enum class Level : uint8_t { kNone = 0, kMemory = 1, kReplicated = 2, kDurable = 3 };
std::string_view LevelName(Level level);  // "none", "memory", ...

enum class AttemptState : uint8_t { kOpen = 0, kComplete = 1, kClosed = 2, kCorrupt = 3, kRetired = 4 };
std::string_view AttemptStateName(AttemptState state);

struct Empty {
  static constexpr const char* kName = "empty body";
  template <class A> void Fields(A&) {}
};

struct AttemptInfo {
  static constexpr const char* kName = "AttemptInfo";
  Id128 attempt, nonce;
  uint64_t generation = 0, step = 0, bytes = 0;  // bytes: sum of the sealed shards' lengths.
  uint32_t try_number = 0, world_size = 0, sealed_ranks = 0;
  AttemptState state = AttemptState::kOpen;
  Level level = Level::kNone;
  bool pinned = false;
  std::string reason;  // Why it is closed, corrupt or not complete; empty otherwise.
  template <class A> void Fields(A& a) {
    a.Fixed(attempt); a.Fixed(nonce);
    a.U64(generation); a.U64(step); a.U64(bytes);
    a.U32(try_number); a.U32(world_size); a.U32(sealed_ranks);
    a.Enum(state, AttemptState::kRetired); a.Enum(level, Level::kDurable); a.Bool(pinned); a.Text(reason, 400);
  }
  friend bool operator==(const AttemptInfo&, const AttemptInfo&) = default;
};

// First message on every connection. A session is one client object in one process; all its connections name it.
struct HelloRequest {
  static constexpr const char* kName = "HelloRequest";
  uint16_t version_min = kProtocolVersion, version_max = kProtocolVersion;
  Id128 session;
  std::string client_name;
  template <class A> void Fields(A& a) { a.U16(version_min); a.U16(version_max); a.Fixed(session); a.Text(client_name, 64); }
};
struct HelloReply {
  static constexpr const char* kName = "HelloReply";
  uint16_t version = kProtocolVersion;
  Id128 node, boot;          // boot: changes when the keeper (and so the memory) was replaced.
  uint64_t incarnation = 0;  // How many workers this keeper has started.
  uint64_t extent_bytes = 0, pool_bytes_max = 0, lease_ns = 0;
  uint32_t retain = 0;       // Complete steps kept per namespace.
  uint32_t daemon_pid = 0;
  bool is_private = false;      // Started by a client library for this user.
  std::string daemon_version;
  std::string store;            // URL of the durable tier, without credentials; empty: there is none.
  template <class A> void Fields(A& a) {
    a.U16(version); a.Fixed(node); a.Fixed(boot); a.U64(incarnation); a.U64(extent_bytes); a.U64(pool_bytes_max); a.U64(lease_ns);
    a.U32(retain); a.U32(daemon_pid); a.Bool(is_private); a.Text(daemon_version, 64); a.Text(store, kStoreUrlBytesMax);
  }
};

enum class ParentMode : uint8_t { kLatest = 0, kAttempt = 1, kFresh = 2 };
struct OpenGenerationRequest {
  static constexpr const char* kName = "OpenGenerationRequest";
  std::string ns;
  Id128 nonce;
  uint32_t world_size = 0, rank = 0;
  ParentMode parent_mode = ParentMode::kLatest;
  Id128 parent;  // With kAttempt.
  template <class A> void Fields(A& a) {
    a.Text(ns, kNamespaceBytesMax); a.Fixed(nonce); a.U32(world_size); a.U32(rank); a.Enum(parent_mode, ParentMode::kFresh); a.Fixed(parent);
  }
};
struct OpenGenerationReply {
  static constexpr const char* kName = "OpenGenerationReply";
  uint64_t generation = 0;
  bool has_parent = false;
  Id128 parent;
  uint64_t parent_step = 0;
  template <class A> void Fields(A& a) { a.U64(generation); a.Bool(has_parent); a.Fixed(parent); a.U64(parent_step); }
};

struct SlotInfo {
  uint64_t slot = 0;
  uint32_t extents = 0;
};
// Announces `count` shards of `bytes` (LeaseBytes) each; answered when their extents are pre-faulted, or with fewer at the deadline.
struct PrepareSlotsRequest {
  static constexpr const char* kName = "PrepareSlotsRequest";
  std::string ns;
  uint64_t bytes = 0, timeout_ns = 0;
  uint32_t count = 0;
  template <class A> void Fields(A& a) { a.Text(ns, kNamespaceBytesMax); a.U64(bytes); a.U64(timeout_ns); a.U32(count); }
};
struct PrepareSlotsReply {
  static constexpr const char* kName = "PrepareSlotsReply";
  std::vector<SlotInfo> slots;
  template <class A> void Fields(A& a) {
    a.List(slots, kExtentsMax, [](auto& b, SlotInfo& s) { b.U64(s.slot); b.U32(s.extents); });
  }
};

struct ReserveRequest {
  static constexpr const char* kName = "ReserveRequest";
  std::string ns;
  uint64_t generation = 0;
  Id128 nonce;
  uint64_t step = 0;
  uint32_t try_number = 0, world_size = 0, rank = 0;
  uint64_t bytes = 0;       // LeaseBytes(length) at least.
  uint64_t timeout_ns = 0;  // How long the daemon may wait for extents that are being pre-faulted.
  template <class A> void Fields(A& a) {
    a.Text(ns, kNamespaceBytesMax); a.U64(generation); a.Fixed(nonce); a.U64(step); a.U32(try_number); a.U32(world_size); a.U32(rank);
    a.U64(bytes); a.U64(timeout_ns);
  }
};
struct ReserveReply {
  static constexpr const char* kName = "ReserveReply";
  uint64_t lease = 0, slot = 0;
  uint32_t extents = 0;  // The slot's capacity is extents * extent_bytes. An unknown slot is mapped through FetchExtents.
  Id128 attempt;
  uint64_t lease_ns = 0;
  std::vector<uint64_t> gone_slots;  // Dissolved into this one: unmap them now.
  template <class A> void Fields(A& a) {
    a.U64(lease); a.U64(slot); a.U32(extents); a.Fixed(attempt); a.U64(lease_ns);
    a.List(gone_slots, kExtentsMax, [](auto& b, uint64_t& s) { b.U64(s); });
  }
};

// One batch of descriptors, at most kDescriptorsPerFrameMax: asking for the next batch acknowledges the one before.
struct FetchExtentsRequest {
  static constexpr const char* kName = "FetchExtentsRequest";
  bool read_only = false;
  uint64_t slot = 0;  // Writable: a slot of this session.
  uint64_t pin = 0;   // Read-only: a pin of this session ...
  uint32_t rank = 0;  // ... and whose shard.
  uint32_t first = 0; // Index of the first extent wanted.
  template <class A> void Fields(A& a) { a.Bool(read_only); a.U64(slot); a.U64(pin); a.U32(rank); a.U32(first); }
};
struct FetchExtentsReply {
  static constexpr const char* kName = "FetchExtentsReply";
  uint32_t first = 0, count = 0, total = 0;  // `count` descriptors come with this message, in order.
  template <class A> void Fields(A& a) { a.U32(first); a.U32(count); a.U32(total); }
};

struct SealRequest {
  static constexpr const char* kName = "SealRequest";
  uint64_t lease = 0, length_bytes = 0, header_bytes = 0, static_offset = 0;
  Hash256 block_root, structure;
  uint32_t whole_crc = 0;
  template <class A> void Fields(A& a) {
    a.U64(lease); a.U64(length_bytes); a.U64(header_bytes); a.U64(static_offset); a.Fixed(block_root); a.Fixed(structure); a.U32(whole_crc);
  }
};
struct SealReply {
  static constexpr const char* kName = "SealReply";
  Hash256 record;         // Identity of the seal record.
  bool complete = false;  // The whole attempt is complete by this seal.
  template <class A> void Fields(A& a) { a.Fixed(record); a.Bool(complete); }
};

struct LeaseRequest {  // Abort (the client promises that nothing writes any more) and Renew.
  static constexpr const char* kName = "LeaseRequest";
  uint64_t lease = 0;
  std::string reason;  // Abort: shown to the other ranks.
  template <class A> void Fields(A& a) { a.U64(lease); a.Text(reason, 200); }
};

struct WaitRequest {
  static constexpr const char* kName = "WaitRequest";
  std::string ns;
  Id128 attempt;
  Level level = Level::kMemory;
  uint64_t timeout_ns = 0;
  template <class A> void Fields(A& a) { a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); a.Enum(level, Level::kDurable); a.U64(timeout_ns); }
};
struct WaitReply {
  static constexpr const char* kName = "WaitReply";
  Level level = Level::kNone;  // kNone: it was complete and has been retired since.
  template <class A> void Fields(A& a) { a.Enum(level, Level::kDurable); }
};

struct NamespaceRequest {  // Latest, ListSteps.
  static constexpr const char* kName = "NamespaceRequest";
  std::string ns;
  Level level = Level::kMemory;
  uint32_t first = 0;  // ListSteps: index to page from.
  template <class A> void Fields(A& a) { a.Text(ns, kNamespaceBytesMax); a.Enum(level, Level::kDurable); a.U32(first); }
};
struct ListStepsReply {
  static constexpr const char* kName = "ListStepsReply";
  std::vector<AttemptInfo> attempts;  // Newest of the lineage first, then everything else known; open and corrupt ones too.
  uint32_t total = 0;
  template <class A> void Fields(A& a) {
    a.List(attempts, 4096, [](auto& b, AttemptInfo& i) { i.Fields(b); });
    a.U32(total);
  }
};
struct NamespaceInfo {
  std::string ns;
  uint64_t generation = 0, bytes = 0;
  uint32_t complete_steps = 0;
};
struct ListNamespacesReply {
  static constexpr const char* kName = "ListNamespacesReply";
  std::vector<NamespaceInfo> namespaces;
  uint32_t total = 0;
  template <class A> void Fields(A& a) {
    a.List(namespaces, 4096, [](auto& b, NamespaceInfo& n) {
      b.Text(n.ns, kNamespaceBytesMax); b.U64(n.generation); b.U64(n.bytes); b.U32(n.complete_steps);
    });
    a.U32(total);
  }
};

enum class ReadChoice : uint8_t { kLatest = 0, kStep = 1, kAttempt = 2 };
// Chooses and pins one attempt. With a nonce, all ranks of that launch get the same one for the same sequence number (I-7).
struct OpenReadRequest {
  static constexpr const char* kName = "OpenReadRequest";
  std::string ns;
  ReadChoice choice = ReadChoice::kLatest;
  uint64_t step = 0;
  Id128 attempt, nonce;
  uint32_t sequence = 0;
  template <class A> void Fields(A& a) {
    a.Text(ns, kNamespaceBytesMax); a.Enum(choice, ReadChoice::kAttempt); a.U64(step); a.Fixed(attempt); a.Fixed(nonce); a.U32(sequence);
  }
};
struct OpenReadReply {
  static constexpr const char* kName = "OpenReadReply";
  uint64_t pin = 0, pin_ns = 0;
  AttemptInfo info;
  std::string store;  // Where its durable copy is, to be read by the client itself; empty: nowhere.
  template <class A> void Fields(A& a) { a.U64(pin); a.U64(pin_ns); info.Fields(a); a.Text(store, kStoreUrlBytesMax); }
};

struct ShardRequest {  // ShardInfo, ReportCorrupt.
  static constexpr const char* kName = "ShardRequest";
  uint64_t pin = 0;
  uint32_t rank = 0;
  uint64_t block = 0;  // ReportCorrupt: the daemon re-reads this block and believes only itself.
  template <class A> void Fields(A& a) { a.U64(pin); a.U32(rank); a.U64(block); }
};
struct ShardInfoReply {
  static constexpr const char* kName = "ShardInfoReply";
  FixedBytes<SealRecord::kBytes> record;
  uint32_t extents = 0;  // 0: this node's memory does not have it (any more, or whole); the store of OpenReadReply has.
  template <class A> void Fields(A& a) { a.Fixed(record); a.U32(extents); }
};
struct ReportCorruptReply {
  static constexpr const char* kName = "ReportCorruptReply";
  bool confirmed = false;  // The daemon found it, too: the shard is quarantined.
  template <class A> void Fields(A& a) { a.Bool(confirmed); }
};

struct PinRequest {  // Unpin.
  static constexpr const char* kName = "PinRequest";
  uint64_t pin = 0;
  template <class A> void Fields(A& a) { a.U64(pin); }
};
struct PinStepRequest {  // An operator's pin: no expiry, survives the worker.
  static constexpr const char* kName = "PinStepRequest";
  std::string ns;
  Id128 attempt;
  bool on = true;
  template <class A> void Fields(A& a) { a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); a.Bool(on); }
};

// Asks for level `durable`. Idempotent; any rank of the attempt, at any time between its first lease and its retirement.
struct MakeDurableRequest {
  static constexpr const char* kName = "MakeDurableRequest";
  std::string ns;
  Id128 attempt;
  template <class A> void Fields(A& a) { a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); }
};

struct StatusReply {
  static constexpr const char* kName = "StatusReply";
  std::string json;  // docs/operating/status.md
  template <class A> void Fields(A& a) { a.Text(json, kFrameBytesMax); }
};

}  // namespace sp
