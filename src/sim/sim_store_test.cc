// The simulated store: what it does wrong, and what it finds wrong.
#include "sim/sim_store.h"

#include <gtest/gtest.h>

#include "format/manifest.h"
#include "sim/model.h"

namespace sp::sim {
namespace {

class SimStoreTest : public ::testing::Test {
 protected:
  SimStoreTest() {
    record.key = {1000, "job", 1, Nonce(), 10, 0};
    record.attempt = record.key.AttemptId();
    record.world_size = 1;
    record.length_bytes = 8192;
    record.block_root = BlockRoot(words);
    step.records = {record};
    step.lineage = {{1000, "job", 1, Nonce(), 1, false, {}, 0, 0, true, true}};
  }
  static Id128 Nonce() {
    Id128 id;
    id.bytes.fill(7);
    return id;
  }
  bool PutShard() { return *store.Write(ShardObjectKey(record), {words, ""}) && *store.Write(ChecksumsObjectKey(record), {words, ""}); }
  Result<bool> PutManifest() { return store.Write(ManifestObjectKey(record.key), {{}, MakeManifest(step.records)}); }
  void PutStep() {
    EXPECT_TRUE(PutShard());
    EXPECT_TRUE(*store.Write(LineageObjectKey(record.key), {{}, MakeLineage(step.lineage)}));
    EXPECT_TRUE(*PutManifest());
  }

  std::vector<uint32_t> words = {3, 5};
  SealRecord record;
  StoredStep step;
  SimStore store{false};
};

TEST_F(SimStoreTest, KeepsWholeStepsByNamespace) {
  PutStep();
  EXPECT_FALSE(*PutManifest()) << "again: it is there";
  EXPECT_TRUE(store.IsWhole(record.attempt));
  EXPECT_EQ(*store.List({1000, "job"}), std::vector<StoredStep>{step});
  EXPECT_TRUE(store.List({1001, "job"})->empty());
}

TEST_F(SimStoreTest, I23_FindsAManifestThatComesTooEarly) {
  EXPECT_THROW((void)PutManifest(), Violation);
  store.SpoilNext(StoreFault::kFlipsStored, 1);
  EXPECT_TRUE(PutShard());
  EXPECT_FALSE(store.HasShard(record));
  EXPECT_TRUE(*store.Write(LineageObjectKey(record.key), {{}, MakeLineage(step.lineage)}));
  EXPECT_THROW((void)PutManifest(), Violation);
}

TEST_F(SimStoreTest, I24_FindsAnOverwrite) {
  EXPECT_TRUE(PutShard());
  EXPECT_FALSE(*store.Write(ShardObjectKey(record), {words, ""}));
  EXPECT_THROW((void)store.Write(ShardObjectKey(record), {{1, 1}, ""}), Violation);
}

TEST_F(SimStoreTest, I24_OnlyWhatAnOrderNamedGoesAndInOrder) {
  PutStep();
  const StepName name{"job", 10, record.attempt};
  const std::string mark = name.Prefix() + std::string(kDeletingName), manifest = ManifestObjectKey(record.key);
  EXPECT_THROW((void)store.Delete(manifest), Violation) << "nobody has named it";
  store.Name(name);
  EXPECT_THROW((void)store.Delete(manifest), Violation) << "there is no mark";
  EXPECT_TRUE(*store.Write(mark, {{}, "{}"}));
  EXPECT_THROW((void)store.Delete(manifest), Violation) << "it is the newest";
  const StoredStep older = step;
  record.key.step = 20;
  record.attempt = record.key.AttemptId();
  step.records = {record};
  PutStep();
  EXPECT_THROW((void)store.Delete(ShardObjectKey(older.records[0])), Violation) << "its manifest is there";
  EXPECT_TRUE(store.Delete(manifest).ok());
  EXPECT_EQ(store.ListAll({1000, "job"})->remains, std::vector<StepName>{name});
  EXPECT_EQ(store.ListAll({1000, "job"})->steps, std::vector<StoredStep>{step});
  EXPECT_THROW((void)store.Delete(mark), Violation) << "something of it is there";
  EXPECT_THROW((void)store.Write(manifest, {{}, MakeManifest(older.records)}), Violation) << "it is being deleted";
  const std::vector<std::string> keys = *store.ListKeys(name);
  for (const std::string& key : keys) EXPECT_TRUE(key == mark || store.Delete(key).ok());
  EXPECT_TRUE(store.Delete(mark).ok());
  EXPECT_TRUE(store.Delete(mark).ok()) << "again";
  EXPECT_TRUE(store.ListKeys(name)->empty());
  EXPECT_TRUE(store.ListAll({1000, "job"})->remains.empty());
}

TEST_F(SimStoreTest, AnswersAreLostAndWritesAreLate) {
  const std::string key = ShardObjectKey(record);
  store.SpoilNext(StoreFault::kFails, 1);
  EXPECT_FALSE(store.Write(key, {words, ""}));
  EXPECT_EQ(store.objects(), 0u);
  store.SpoilNext(StoreFault::kArrivesLate, 1);
  EXPECT_FALSE(store.Write(key, {words, ""}));
  EXPECT_EQ(store.objects(), 0u);
  store.DeliverLate();
  EXPECT_EQ(store.objects(), 1u);
  store.SpoilNext(StoreFault::kAnswerLost, 1);
  EXPECT_FALSE(store.Write(ChecksumsObjectKey(record), {words, ""}));
  EXPECT_EQ(store.objects(), 2u);
  EXPECT_TRUE(store.HasShard(record));
}

TEST_F(SimStoreTest, AFlippedWordIsSentOrRefused) {
  EXPECT_TRUE(PutShard());
  store.SpoilNext(StoreFault::kFlipsRead, 1);
  EXPECT_NE(store.Read(ShardObjectKey(record))->words, words);
  EXPECT_EQ(store.Read(ShardObjectKey(record))->words, words);
  SimStore verifies(true);
  verifies.SpoilNext(StoreFault::kFlipsStored, 1);
  EXPECT_EQ(verifies.Write(ShardObjectKey(record), {words, ""}).error().code(), StatusCode::kCorrupt);
  verifies.SetHealth(StoreHealth::kRefuses);
  EXPECT_EQ(verifies.List({1000, "job"}).error().code(), StatusCode::kUnavailable);
}

}  // namespace
}  // namespace sp::sim
