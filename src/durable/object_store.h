// ObjectStore: what the durable tier needs of a place that keeps objects under names, and no more (DESIGN 7).
//
// An object is written whole or not at all and never changed afterwards. Nothing here overwrites: the data of a step lies under keys that contain
// its attempt, and the one object that makes it a step, the manifest, is made by Create, of which exactly one caller succeeds.
//
// Calls block and are bounded by CallLimits; every store may be called from any number of threads at once. Errors name the URL of the object and what
// to do about it, never a credential. The codes are the same for all stores (object_store_conformance.h holds them to it):
//
//   kNotFound     the store answered that there is no such object (or bucket, or base directory)
//   kUnavailable  it could not be asked, or says that it is busy: the same call may succeed later
//   kDeadline     no answer in time. What was to be written may be there all the same: ask with Head, do not guess
//   kDenied       these credentials may not do that
//   kCorrupt      the bytes that arrived are not those that were sent, on either way
//   kNoSpace      it is full
//   kClosed       cancelled by the caller
//   kInvalidArgument  a key or a URL that no store has; also a region, an endpoint or a clock that the store refuses for good
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/status.h"

namespace sp {

// What Probe writes, and deletes again, lies under it.
inline constexpr std::string_view kProbeFolder = ".safepoint-probe/";

// Found out by Probe, not guessed from the URL.
struct StoreAbilities {
  // A second Create of one key is refused by the store itself, also across processes. A store without it cannot be used for manifests.
  bool conditional_create = false;
  // The store compares what arrived with the checksum that came with it. Without, whoever writes must read back before he believes (I-23).
  bool verifies_checksums = false;
  friend bool operator==(const StoreAbilities&, const StoreAbilities&) = default;
};

struct ObjectInfo {
  std::string key;
  uint64_t size_bytes = 0;
  int64_t modified_unix_s = 0;     // By the store's clock: for people and for retention by age, decides nothing else.
  std::optional<uint32_t> crc32c;  // Of the whole object, if the store keeps one.
};

struct UnfinishedUpload {
  std::string key, id;
  int64_t started_unix_s = 0;
  bool abandoned = false;  // The store knows that its writer is gone. Otherwise only its age tells.
};

struct ListPage {
  std::vector<ObjectInfo> objects;  // Ascending by key.
  std::string next;                 // Cursor of the next page; empty: this was the last.
};

// The content of an object. Read piece by piece, and not from a mapping: what lies in extents can be changed by clients, and a page that one of them
// has punched out would end whoever touches it (I-26).
struct PutSource {
  uint64_t size_bytes = 0;
  std::vector<uint32_t> block_crcs;  // CRC32C of each kBlockBytes, as sealed; the last block may be short.
  // Fills `out` with the bytes from `offset` on. Called from any number of threads at once, also those of the network, until the call has returned; so it
  // does not wait for anything.
  std::function<Status(uint64_t offset, MutableByteSpan out)> read;
  // Optional. Called on the thread of the caller before the next so many bytes are read; waits until it is their turn.
  std::function<void(uint64_t bytes)> pace;
  // Of bytes that belong to the caller and do not change until the call has returned.
  static PutSource OfMemory(ByteSpan bytes, std::vector<uint32_t> block_crcs);
  static PutSource OfMemory(ByteSpan bytes);  // Makes the checksums.
};

struct CallLimits {
  Nanos deadline = std::numeric_limits<Nanos>::max();  // By the clock that the store was made with.
  const std::atomic<bool>* cancelled = nullptr;
  // ReadRange only: what this machine has of the object in a cache of its own is no proof that the store has it. Best with memory of AlignedBuffer.
  bool past_cache = false;
  // Called while the call gets on although nothing reaches the store: read back, or waiting for its turn. From any thread, also at once.
  std::function<void()> alive;
  // Put only: called with the number of bytes that have reached the store since the last call; from any thread, one at a time.
  std::function<void(uint64_t)> progress;
};

class ObjectStore {
 public:
  virtual ~ObjectStore() = default;

  // "s3://bucket/base", "file:///base": for messages, and complete enough to open the store again (without credentials).
  virtual const std::string& url() const = 0;

  // Writes, reads and removes small objects of its own under `.safepoint-probe/`. Cheap enough for each start of a daemon.
  virtual Result<StoreAbilities> Probe(const CallLimits& limits) = 0;

  // A new object from memory, in parallel parts where the store has them. Sends the checksums of `source` with the bytes where the store verifies
  // them: memory that no longer matches its seal is kCorrupt. An object of that key which is there already is left as it is, and is kOk if it has
  // the length of `source` and no other checksum that the store tells, kCorrupt otherwise. That its bytes are the same is for the caller to find out
  // (VerifyObject, durable/verify.h).
  virtual Status Put(const std::string& key, const PutSource& source, const CallLimits& limits) = 0;

  // True: it was made. False: there was one, which is left as it is. One request, never in parts (stores ignore the condition there). After
  // kDeadline or kUnavailable it may have been made: read it back.
  virtual Result<bool> Create(const std::string& key, ByteSpan content, const CallLimits& limits) = 0;

  // Exactly the bytes [offset, offset + out.size()). An object that ends before is kCorrupt.
  virtual Status ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) = 0;
  virtual Result<ObjectInfo> Head(const std::string& key, const CallLimits& limits) = 0;
  // All keys that begin with `prefix` (a text, not a folder), ascending. May lag behind what was written: it delays, it never decides.
  virtual Result<ListPage> List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) = 0;
  // kOk also when there is none.
  virtual Status Delete(const std::string& key, const CallLimits& limits) = 0;

  // What Put began and nobody finished, under `prefix`. For the sweep after a crash.
  virtual Result<std::vector<UnfinishedUpload>> ListUploads(const std::string& prefix, const CallLimits& limits) = 0;
  virtual Status AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) = 0;
};

// The objects of all pages, ascending by key: one by one, or at once where there cannot be too many of them.
Status ForEachObject(ObjectStore& store, const std::string& prefix, const CallLimits& limits, const std::function<void(const ObjectInfo&)>& on_object);
Result<std::vector<ObjectInfo>> ListAll(ObjectStore& store, const std::string& prefix, const CallLimits& limits);

// What to call an object in messages: the store's URL with the key behind its path.
std::string ObjectUrl(const ObjectStore& store, const std::string& key);

// Keys are one to 900 bytes: segments of [A-Za-z0-9._=+@%-], none empty, "." or "..", separated by "/". kInvalidArgument otherwise: a name that
// would leave the base is not repaired, it is refused.
Status CheckKey(const std::string& key);
// The same for a prefix, which may be empty or end anywhere.
Status CheckPrefix(const std::string& prefix);

// For stores. kClosed when cancelled, kDeadline when `now` is past the deadline; the message begins with `what`, e.g. "put file:///base/key".
Status CheckLimits(const CallLimits& limits, Nanos now, const std::string& what);
// For stores. kInvalidArgument unless `source` has a checksum for every block.
Status CheckSource(const PutSource& source);
// For stores. Reads one block of the source; kCorrupt when it does not match its checksum. `out` has the block's length.
Status ReadBlock(const PutSource& source, uint64_t block, MutableByteSpan out);
// That error.
Status BlockDiffers(uint64_t block);
// The status with "`what`: " before its message.
Status WithContext(const std::string& what, const Status& status);

}  // namespace sp
