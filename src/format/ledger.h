// Ledger: what the worker must know again after a SIGKILL, as an append-only log in a memfd that the keeper holds
// (docs/formats/ledger.md). Pure: works on mapped bytes that the caller owns.
//
// Layout: one header page, then two areas of equal size. Entries are appended to the active area; an entry counts once the commit word,
// which says which area is active and where its log ends, has been moved past it: one release store, so a kill between any two
// instructions leaves the old log or the new one, never half an entry. When the area is full, a snapshot is written to the other area, and
// the same store flips to it. The commit word carries its own check bits.
#pragma once

#include <variant>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "format/constants.h"
#include "format/seal_record.h"
#include "format/wire.h"

namespace sp {

// A client object in one process: identity of writers and readers.
struct SessionKey {
  Id128 session;
  uint32_t uid = 0;
  uint32_t pid = 0;         // In the daemon's pid namespace; 0 if not visible.
  uint64_t start_time = 0;  // Clock ticks since boot (field 22 of stat); 0 if not visible.
  template <class A> void Fields(A& a) { a.Fixed(session); a.U32(uid); a.U32(pid); a.U64(start_time); }
  friend bool operator==(const SessionKey&, const SessionKey&) = default;
};

namespace ledger {

struct Generation {  // Opened; fences everything below it.
  static constexpr const char* kName = "Generation";
  uint32_t uid = 0;
  std::string ns;
  uint64_t generation = 0;
  Id128 nonce;
  uint32_t world_size = 0;
  bool has_parent = false;
  Id128 parent;
  uint64_t parent_generation = 0, parent_step = 0;  // Where the lineage goes on below this generation.
  bool fresh = false;          // Opened parentless on purpose.
  bool ever_complete = false;  // In snapshots: some attempt of it was complete once.
  template <class A> void Fields(A& a) {
    a.U32(uid); a.Text(ns, kNamespaceBytesMax); a.U64(generation); a.Fixed(nonce); a.U32(world_size); a.Bool(has_parent); a.Fixed(parent);
    a.U64(parent_generation); a.U64(parent_step); a.Bool(fresh); a.Bool(ever_complete);
  }
  friend bool operator==(const Generation&, const Generation&) = default;
};

struct Slot {  // Extents lent, writable, to a session; they stay its own until the session is dead.
  static constexpr const char* kName = "Slot";
  uint64_t slot = 0;
  SessionKey session;
  std::vector<uint32_t> extents;
  template <class A> void Fields(A& a) {
    a.U64(slot); session.Fields(a);
    a.List(extents, kExtentsMax, [](auto& b, uint32_t& e) { b.U32(e); });
  }
  friend bool operator==(const Slot&, const Slot&) = default;
};

struct SlotGone {  // The extents went back to the pool (or into another slot of the same process).
  static constexpr const char* kName = "SlotGone";
  uint64_t slot = 0;
  template <class A> void Fields(A& a) { a.U64(slot); }
  friend bool operator==(const SlotGone&, const SlotGone&) = default;
};

struct Lease {  // A slot lent for one shard.
  static constexpr const char* kName = "Lease";
  uint64_t lease = 0, slot = 0;
  AttemptKey key;
  uint32_t world_size = 0, rank = 0;
  template <class A> void Fields(A& a) {
    a.U64(lease); a.U64(slot); a.U32(key.uid); a.Text(key.ns, kNamespaceBytesMax); a.U64(key.generation); a.Fixed(key.nonce);
    a.U64(key.step); a.U32(key.try_number); a.U32(world_size); a.U32(rank);
  }
  friend bool operator==(const Lease&, const Lease&) = default;
};

struct LeaseEnded {  // Without a seal: aborted, expired, or its writer died.
  static constexpr const char* kName = "LeaseEnded";
  uint64_t lease = 0, slot = 0;
  bool writer_may_write = false;  // Expired with a living writer: the slot is a zombie until the writer aborts or dies.
  template <class A> void Fields(A& a) { a.U64(lease); a.U64(slot); a.Bool(writer_may_write); }
  friend bool operator==(const LeaseEnded&, const LeaseEnded&) = default;
};

struct Sealed {  // The shard in `slot` is final. The lease ends with it.
  static constexpr const char* kName = "Sealed";
  uint64_t lease = 0, slot = 0;
  FixedBytes<SealRecord::kBytes> record;
  template <class A> void Fields(A& a) { a.U64(lease); a.U64(slot); a.Fixed(record); }
  friend bool operator==(const Sealed&, const Sealed&) = default;
};

struct Manifest {  // Seal record of the manifest: the attempt is complete. Its bytes are made again from the records.
  static constexpr const char* kName = "Manifest";
  FixedBytes<SealRecord::kBytes> record;
  template <class A> void Fields(A& a) { a.Fixed(record); }
  friend bool operator==(const Manifest&, const Manifest&) = default;
};

enum class TombstoneWhy : uint8_t { kClosed = 0, kRetired = 1 };
struct Tombstone {  // Beats every record of its attempt.
  static constexpr const char* kName = "Tombstone";
  uint32_t uid = 0;
  std::string ns;
  Id128 attempt;
  TombstoneWhy why = TombstoneWhy::kClosed;
  std::string reason;
  template <class A> void Fields(A& a) {
    a.U32(uid); a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); a.Enum(why, TombstoneWhy::kRetired); a.Text(reason, 400);
  }
  friend bool operator==(const Tombstone&, const Tombstone&) = default;
};

struct Quarantine {  // This node found its copy of the record's shard corrupt.
  static constexpr const char* kName = "Quarantine";
  Hash256 record;
  uint64_t block = 0;
  template <class A> void Fields(A& a) { a.Fixed(record); a.U64(block); }
  friend bool operator==(const Quarantine&, const Quarantine&) = default;
};

struct OperatorPin {
  static constexpr const char* kName = "OperatorPin";
  uint32_t uid = 0;
  std::string ns;
  Id128 attempt;
  bool on = true;
  template <class A> void Fields(A& a) { a.U32(uid); a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); a.Bool(on); }
  friend bool operator==(const OperatorPin&, const OperatorPin&) = default;
};

struct ReadPin {  // A restore in progress; `on` false: given back or expired.
  static constexpr const char* kName = "ReadPin";
  uint64_t pin = 0;
  SessionKey session;
  std::string ns;
  Id128 attempt;
  bool on = true;
  template <class A> void Fields(A& a) { a.U64(pin); session.Fields(a); a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); a.Bool(on); }
  friend bool operator==(const ReadPin&, const ReadPin&) = default;
};

struct DurableWish {  // Somebody asked for level `durable`; `on` false: it is given up, and why.
  static constexpr const char* kName = "DurableWish";
  uint32_t uid = 0;
  std::string ns;
  Id128 attempt;
  bool on = true;
  std::string reason;
  template <class A> void Fields(A& a) {
    a.U32(uid); a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); a.Bool(on); a.Text(reason, 400);
  }
  friend bool operator==(const DurableWish&, const DurableWish&) = default;
};

struct StoredShard {  // The store has confirmed every byte of it. With the record, because memory may let go of the shard.
  static constexpr const char* kName = "StoredShard";
  FixedBytes<SealRecord::kBytes> record;
  bool read_back = false;  // By reading it back; else the store compared the checksums that were sent with the bytes.
  template <class A> void Fields(A& a) { a.Fixed(record); a.Bool(read_back); }
  friend bool operator==(const StoredShard&, const StoredShard&) = default;
};

struct StoredManifest {  // And its manifest object exists: the attempt is durable. The seal record of the manifest.
  static constexpr const char* kName = "StoredManifest";
  FixedBytes<SealRecord::kBytes> record;
  template <class A> void Fields(A& a) { a.Fixed(record); }
  friend bool operator==(const StoredManifest&, const StoredManifest&) = default;
};

struct Evicted {  // A durable attempt left this node's memory; it can still be read from the store.
  static constexpr const char* kName = "Evicted";
  uint32_t uid = 0;
  std::string ns;
  Id128 attempt;
  template <class A> void Fields(A& a) { a.U32(uid); a.Text(ns, kNamespaceBytesMax); a.Fixed(attempt); }
  friend bool operator==(const Evicted&, const Evicted&) = default;
};

}  // namespace ledger

// The index in this variant + 1 is the entry's type number on disk: append only.
using LedgerEntry = std::variant<ledger::Generation, ledger::Slot, ledger::SlotGone, ledger::Lease, ledger::LeaseEnded, ledger::Sealed,
                                 ledger::Manifest, ledger::Tombstone, ledger::Quarantine, ledger::OperatorPin, ledger::ReadPin, ledger::DurableWish,
                                 ledger::StoredShard, ledger::StoredManifest, ledger::Evicted>;

// Owned by the event loop.
class Ledger {
 public:
  static constexpr uint64_t kMagic = 0x52454744454c5053;  // "SPLEDGER"
  static constexpr uint32_t kVersion = 1;
  static constexpr uint64_t kHeaderBytes = 4096;
  static constexpr uint64_t kAreaBytesMin = 512;

  struct Contents {
    std::vector<LedgerEntry> entries;
    uint64_t damaged_entries = 0;  // Skipped: their checksum did not match. Whatever they said is unknown now.
  };

  // `memory` stays mapped for the ledger's life and is aligned to 8 bytes. All zeros: formatted. kProtocol: another format or version,
  // kCorrupt: the commit word is damaged, so where the log ends is unknown; both left untouched (I-35). kInvalidArgument: too small.
  static Result<Ledger> Open(MutableByteSpan memory);

  Contents Read() const;
  // kNoSpace: does not fit any more; call Compact with a snapshot that includes `entry`.
  Status Append(const LedgerEntry& entry);
  // Replaces the log by `snapshot`. kNoSpace: even that does not fit; the old log stays.
  Status Compact(const std::vector<LedgerEntry>& snapshot);
  uint64_t used_bytes() const;
  uint64_t area_bytes() const { return area_bytes_; }

 private:
  Ledger(MutableByteSpan memory, uint64_t area_bytes, uint32_t active, uint64_t tail)
      : memory_(memory), area_bytes_(area_bytes), active_(active), tail_(tail) {}
  MutableByteSpan Area(uint32_t which) const;
  void Publish(uint32_t active, uint64_t tail);

  MutableByteSpan memory_;
  uint64_t area_bytes_;
  uint32_t active_;  // Area that holds the log: 0 or 1.
  uint64_t tail_;    // Bytes of it in use; a multiple of 8.
};

std::vector<uint8_t> EncodeLedgerEntry(const LedgerEntry& entry);  // Framed: magic, CRC32C, length, type; padded to 8 bytes.
// Decodes one framed entry at the start of `bytes`; `*consumed` is its framed size, set only on success. kProtocol: not a whole valid entry.
Result<LedgerEntry> DecodeLedgerEntry(ByteSpan bytes, uint64_t* consumed);

}  // namespace sp
