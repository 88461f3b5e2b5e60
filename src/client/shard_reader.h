// Reads one sealed shard, from the pool's memory or from a store; every byte it gives out was checked against the seal record. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "client/client_core.h"
#include "client/copy_engine.h"
#include "client/fork_guard.h"
#include "client/read_error.h"
#include "durable/stored_shard.h"
#include "format/seal_record.h"
#include "os/fd.h"

namespace sp {

class ShardReader {
 public:
  using FindStore = std::function<Result<std::shared_ptr<ObjectStore>>()>;
  // Fetches what is needed of rank `rank` of the pinned attempt, read-only, and checks the checksum list against the seal record. `store`: where the
  // shard is read from if the daemon says that its memory does not have it.
  static ReadResult<std::unique_ptr<ShardReader>> Open(CoreHandle core, const Origin& origin, uint64_t pin, const AttemptInfo& info, uint32_t rank,
                                                       const FindStore& store);
  // From a store, without a daemon. kIncomplete: an object of the shard is missing.
  static ReadResult<std::unique_ptr<ShardReader>> OpenStored(std::shared_ptr<ObjectStore> store, const SealRecord& record);

  ShardReader(const ShardReader&) = delete;
  ShardReader& operator=(const ShardReader&) = delete;

  const SealRecord& record() const { return record_; }
  const Hash256& identity() const { return identity_; }  // Of the seal record.
  uint64_t blocks() const { return crcs_.size(); }
  bool from_store() const { return stored_ != nullptr; }

  // The file's header: 8 length bytes and the JSON text. Also checked: the length word, and the static part's hash.
  ReadResult<std::vector<uint8_t>> Header();

  // Copies ranges of the shard to where they are wanted; returns how many bytes. kCorrupt names the first bad block; targets may hold
  // unverified bytes then (state_modified).
  ReadResult<uint64_t> Read(std::span<const ScatterSegment> segments, int threads = 0);

  // Which of the blocks [first, first + count) do not match their checksum.
  Result<std::vector<uint64_t>> Verify(uint64_t first, uint64_t count);

  // Writes the shard to the file, from its offset 0 on. On an error the file has a part of it.
  ReadResult<uint64_t> CopyToFile(int fd);

 private:
  ShardReader(CoreHandle core, const Origin& origin, const SealRecord& record, std::vector<Fd> extents);
  ShardReader(const SealRecord& record, std::unique_ptr<StoredShard> stored);
  Status CheckUsable() const;  // Not in a forked child of the process that has the client.

  ShardSource Source() const;
  Status ReadRaw(MutableByteSpan out, uint64_t offset) const;  // Unverified; across extents.
  Status LoadChecksumList();
  ReadResult<uint64_t> CopyStoredToFile(int fd);
  ReadResult<uint64_t> ReadBlock(uint64_t block, MutableByteSpan buffer) const;  // Verified; its size.
  ReadError Corrupt(std::optional<uint64_t> block, const std::string& what, bool state_modified) const;

  CoreHandle core_;
  const Origin origin_;
  const SealRecord record_;
  const Hash256 identity_;
  const std::vector<Fd> extents_;
  std::vector<int> numbers_;  // Of `extents_`.
  std::vector<uint32_t> crcs_;
  const std::unique_ptr<StoredShard> stored_;  // Null: memory has it.
  const ForkGuard owner_;                      // Of one without a client.
};

}  // namespace sp
