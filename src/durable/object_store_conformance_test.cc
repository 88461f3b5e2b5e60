// The stores of this folder against object_store_conformance.h.
#include "durable/object_store_conformance.h"

#include "durable/faulty_store.h"
#include "durable/file_store.h"
#include "durable/memory_store.h"
#include "os/files.h"

namespace sp {
namespace {

class MemoryPlace : public ConformancePlace {
 public:
  explicit MemoryPlace(StoreAbilities abilities) : store_(clock_, abilities) {}
  ObjectStore& store() override { return store_; }
  const Clock& clock() override { return clock_; }
  bool LeaveUnfinishedUpload(const std::string& key) override {
    store_.LeaveUnfinishedUpload(key);
    return true;
  }

 private:
  ManualClock clock_;
  MemoryStore store_;
};

class FilePlace final : public ConformancePlace {
 public:
  FilePlace() : store_(FileStore::Open("file://" + directory_.path() + "/base", clock_).value()) {}
  ObjectStore& store() override { return *store_; }
  const Clock& clock() override { return clock_; }
  bool LeaveUnfinishedUpload(const std::string& key) override {
    const std::string folder = directory_.path() + "/base/" + key.substr(0, key.rfind('/'));
    std::filesystem::create_directories(folder);
    const std::string name = ".safepoint-upload-" + std::string(32, 'a') + "-" + key.substr(key.rfind('/') + 1);
    return WriteFileAtomic(folder + "/" + name, AsBytes("half"), 0600).ok();
  }

 private:
  ManualClock clock_;
  TemporaryDirectory directory_;
  std::unique_ptr<ObjectStore> store_;
};

// A wrapper that adds no faults is not noticed.
class WrappedPlace final : public MemoryPlace {
 public:
  WrappedPlace() : MemoryPlace({.conditional_create = true, .verifies_checksums = true}), wrapper_(MemoryPlace::store(), clock()) {}
  ObjectStore& store() override { return wrapper_; }

 private:
  FaultyStore wrapper_;
};

template <typename Place, typename... Args>
StoreFactory Factory(const char* name, Args... args) {
  return {name, [=]() -> std::unique_ptr<ConformancePlace> { return std::make_unique<Place>(args...); }};
}

INSTANTIATE_TEST_SUITE_P(Stores, ObjectStoreConformance,
                         testing::Values(Factory<MemoryPlace>("Memory", StoreAbilities{true, true}),
                                         Factory<MemoryPlace>("MemoryWithoutChecksums", StoreAbilities{true, false}), Factory<FilePlace>("File"),
                                         Factory<WrappedPlace>("FaultyWithoutFaults")),
                         StoreName);

}  // namespace
}  // namespace sp
