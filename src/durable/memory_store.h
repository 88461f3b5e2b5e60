// MemoryStore: objects in memory, for tests and the simulator. Thread-safe. Keeps to the interface to the letter; what a real store does wrong is
// added by FaultyStore.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "durable/object_store.h"

namespace sp {

class MemoryStore final : public ObjectStore {
 public:
  // `clock` judges deadlines and dates objects. Without conditional_create, Create replaces and returns true, as stores do that ignore the condition.
  // With verifies_checksums, Put compares the bytes with their block checksums.
  explicit MemoryStore(const Clock& clock, StoreAbilities abilities = {.conditional_create = true, .verifies_checksums = true},
                       std::string url = "memory://store");

  const std::string& url() const override { return url_; }
  Result<StoreAbilities> Probe(const CallLimits& limits) override;
  Status Put(const std::string& key, const PutSource& source, const CallLimits& limits) override;
  Result<bool> Create(const std::string& key, ByteSpan content, const CallLimits& limits) override;
  Status ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) override;
  Result<ObjectInfo> Head(const std::string& key, const CallLimits& limits) override;
  Result<ListPage> List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) override;
  Status Delete(const std::string& key, const CallLimits& limits) override;
  Result<std::vector<UnfinishedUpload>> ListUploads(const std::string& prefix, const CallLimits& limits) override;
  Status AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) override;

  // What a writer that died in Put leaves.
  void LeaveUnfinishedUpload(const std::string& key);

 private:
  using Content = std::shared_ptr<const std::vector<uint8_t>>;  // Owned by the map and by the reads that run while the object is deleted.
  struct Object {
    Content content;
    uint32_t crc32c = 0;
    int64_t modified_unix_s = 0;
  };

  Status Check(const std::string& key, const CallLimits& limits, const std::string& what) const;
  Object MakeObject(std::vector<uint8_t> content) const;

  const Clock& clock_;
  const StoreAbilities abilities_;
  const std::string url_;
  std::mutex mutex_;  // Guards what follows.
  std::map<std::string, Object> objects_;
  std::vector<UnfinishedUpload> uploads_;
  uint64_t last_upload_ = 0;
};

}  // namespace sp
