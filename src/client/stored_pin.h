// One whole step of a store, for whoever reads it without a daemon. Thread-safe.
#pragma once

#include <memory>

#include "client/shard_reader.h"
#include "format/messages.h"
#include "format/stored_step.h"

namespace sp {

class StoredPin {
 public:
  // kNotFound, kCorrupt, kIncomplete: as ReadStoredStep says.
  static Result<std::unique_ptr<StoredPin>> Open(std::shared_ptr<ObjectStore> store, const StepName& name);

  const AttemptInfo& info() const { return info_; }
  uint32_t uid() const { return step_.records.front().key.uid; }
  const std::vector<ledger::Generation>& lineage() const { return step_.lineage; }
  ReadResult<std::unique_ptr<ShardReader>> Shard(uint32_t rank) const;

 private:
  StoredPin(std::shared_ptr<ObjectStore> store, StoredStep step);

  const std::shared_ptr<ObjectStore> store_;
  const StoredStep step_;
  AttemptInfo info_;
};

}  // namespace sp
