// One attempt held for reading: the daemon does not retire it while the pin lasts. Thread-safe.
//
// The pin is renewed in the background until Close, which the destructor does, too; it ends with the process in any case.
#pragma once

#include <memory>
#include <mutex>

#include "client/client_core.h"
#include "base/clock.h"
#include "client/shard_reader.h"
#include "durable/object_store.h"
#include "format/messages.h"

namespace sp {

class ReadPin {
 public:
  ReadPin(CoreHandle core, Origin origin, const OpenReadReply& reply);
  ReadPin(const ReadPin&) = delete;
  ReadPin& operator=(const ReadPin&) = delete;
  ~ReadPin();

  const AttemptInfo& info() const { return reply_.info; }

  // Descriptors and checksum list of one rank's shard; what this node's memory does not have is read from the store. kNotFound: the attempt has no such rank. kCorrupt: the daemon knows that it is,
  // or its checksum list does not match the seal record. kClosed: after Close, or the pin has ended.
  ReadResult<std::unique_ptr<ShardReader>> Shard(uint32_t rank);

  // Has the daemon read this block again; true when it finds it corrupt, too. The shard is out of use then.
  Result<bool> ReportCorrupt(uint32_t rank, uint64_t block);

  // Readers that are open stay usable, but what they read may be replaced under them: they notice, and fail.
  void Close();

 private:
  Status CheckOpen();
  Result<std::shared_ptr<ObjectStore>> Store();

  CoreHandle core_;
  const Origin origin_;
  const OpenReadReply reply_;
  std::mutex mutex_;  // Guards what follows.
  bool closed_ = false;
  std::shared_ptr<ObjectStore> store_;  // Opened when the first shard is read from it.
  uint64_t renewal_ = 0;
};

}  // namespace sp
