#include "client/stored_pin.h"

#include "base/no_memory.h"
#include "durable/open_store.h"
#include "durable/step_store.h"

namespace sp {

StoredPin::StoredPin(std::shared_ptr<ObjectStore> store, StoredStep step) : store_(std::move(store)), step_(std::move(step)) {
  const SealRecord& first = step_.records.front();
  info_.attempt = first.attempt;
  info_.nonce = first.key.nonce;
  info_.generation = first.key.generation;
  info_.step = first.key.step;
  info_.try_number = first.key.try_number;
  info_.world_size = info_.sealed_ranks = first.world_size;
  info_.state = AttemptState::kComplete;
  info_.level = Level::kDurable;
  for (const SealRecord& record : step_.records) info_.bytes += record.length_bytes;
}

Result<std::unique_ptr<StoredPin>> StoredPin::Open(std::shared_ptr<ObjectStore> store, const StepName& name) {
  return OrNoMemory("open a stored step", [&]() -> Result<std::unique_ptr<StoredPin>> {
    SP_ASSIGN_OR_RETURN(StoredStep step, ReadStoredStep(*store, name, ReadLimits(0)));
    return std::unique_ptr<StoredPin>(new StoredPin(std::move(store), std::move(step)));
  });
}

ReadResult<std::unique_ptr<ShardReader>> StoredPin::Shard(uint32_t rank) const {
  return OrNoMemory("open a stored shard", [&]() -> ReadResult<std::unique_ptr<ShardReader>> {
    if (rank >= step_.records.size()) {
      return std::unexpected(Status(StatusCode::kNotFound, "the step has " + std::to_string(step_.records.size()) + " ranks, none of them is rank " +
                                                               std::to_string(rank)));
    }
    return ShardReader::OpenStored(store_, step_.records[rank]);
  });
}

}  // namespace sp
