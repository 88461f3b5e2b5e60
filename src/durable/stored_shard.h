// One shard in a store, read by ranges: the same checks as from memory (I-8), several requests at once, whole blocks straight to where they are wanted.
// Thread-safe; calls block.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "durable/object_store.h"
#include "format/seal_record.h"

namespace sp {

// Bytes [offset, offset + size) of the shard that are wanted at `target`.
struct WantedRange {
  uint64_t offset = 0;
  uint64_t size = 0;
  uint8_t* target = nullptr;
};

class StoredShard {
 public:
  // Reads the checksum list and compares it with the record's root.
  static Result<std::unique_ptr<StoredShard>> Open(std::shared_ptr<ObjectStore> store, const SealRecord& record, const CallLimits& limits);

  const SealRecord& record() const { return record_; }
  const std::vector<uint32_t>& block_crcs() const { return crcs_; }

  struct Report {
    Status status;                         // kCorrupt: a block does not match. kIncomplete: the object is gone, although there is a manifest.
    std::vector<uint64_t> corrupt_blocks;  // Ascending. The ranges' parts in them hold unverified bytes.
    bool target_modified = false;
  };
  // Ranges in any order, with gaps, also overlapping in the shard (not in their targets). Every block with a wanted byte is read whole and compared
  // with its checksum. `requests`: at once.
  Report Read(std::span<const WantedRange> ranges, int requests, const CallLimits& limits) const;
  // Reads and compares the blocks [first, first + count).
  Report Verify(uint64_t first, uint64_t count, int requests, const CallLimits& limits) const;

 private:
  StoredShard(std::shared_ptr<ObjectStore> store, const SealRecord& record, std::vector<uint32_t> crcs);
  Report ReadBlocks(const std::vector<bool>& wanted, std::span<const WantedRange> ranges, int requests, const CallLimits& limits) const;

  const std::shared_ptr<ObjectStore> store_;
  const SealRecord record_;
  const std::string key_;
  const std::vector<uint32_t> crcs_;
};

}  // namespace sp
