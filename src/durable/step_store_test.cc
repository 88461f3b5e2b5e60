// Whole steps in a store, written and read through every fault (I-23, I-24, F57 to F68).
#include "durable/step_store.h"

#include <gtest/gtest.h>

#include "base/crc32c.h"
#include "durable/faulty_store.h"
#include "durable/memory_store.h"
#include "durable/stored_shard.h"
#include "format/constants.h"
#include "format/manifest.h"
#include "os/test_util.h"

namespace sp {
namespace {

Fault MakeFault(StoreCall call, FaultKind kind, uint64_t nth = 1, Status status = Status(StatusCode::kUnavailable, "503")) {
  return {.call = call, .kind = kind, .nth = nth, .times = 1, .key_part = "", .status = std::move(status), .at = 0};
}

std::vector<uint8_t> Bytes(size_t size, uint32_t seed) {
  std::vector<uint8_t> bytes(size);
  uint32_t x = seed * 2654435761u + 1;
  for (uint8_t& b : bytes) b = static_cast<uint8_t>((x = x * 1664525 + 1013904223) >> 24);
  return bytes;
}

struct Steps : testing::Test {
  ManualClock clock;
  MemoryStore memory{clock};
  FaultyStore store{memory, clock};
  StoreAbilities abilities{true, true};
  std::vector<std::vector<uint8_t>> contents;
  StoredStep step;

  void SetUp() override { step = Make(1200, 0); }

  StoredStep Make(uint64_t number, uint32_t try_number) {
    StoredStep made;
    AttemptKey key{1000, "run-3", 7, {}, number, try_number};
    contents.clear();
    for (uint32_t rank = 0; rank < 2; ++rank) {
      contents.push_back(Bytes(3 * kBlockBytes + 100 + rank, static_cast<uint32_t>(number) + rank));
      SealRecord record;
      record.key = key;
      record.attempt = key.AttemptId();
      record.world_size = 2;
      record.rank = rank;
      record.length_bytes = contents[rank].size();
      const PutSource source = PutSource::OfMemory(contents[rank]);
      record.block_root = BlockRoot(source.block_crcs);
      record.whole_crc = Crc32c(0, contents[rank]);
      record.header_bytes = 64;
      record.static_offset = 32;
      made.records.push_back(record);
    }
    made.lineage = {ledger::Generation{1000, "run-3", 7, {}, 2, false, {}, 0, 0, false, true}};
    return made;
  }
  Status PutAll() {
    for (const SealRecord& record : step.records) {
      SP_ASSIGN_OR_RETURN([[maybe_unused]] const ConfirmedBy by, PutShard(store, abilities, record, PutSource::OfMemory(contents[record.rank]), {}));
    }
    return PutManifest(store, abilities, step, {});
  }
  StepName Name() const { return {"run-3", 1200, step.records[0].attempt}; }
  std::shared_ptr<ObjectStore> Shared() { return {&store, [](ObjectStore*) {}}; }
  std::vector<uint8_t> ReadAll(uint32_t rank) {
    auto shard = StoredShard::Open(Shared(), step.records[rank], {});
    EXPECT_TRUE(shard) << shard.error().ToString();
    if (!shard) return {};
    std::vector<uint8_t> out(step.records[rank].length_bytes);
    const WantedRange all{0, out.size(), out.data()};
    const auto report = (*shard)->Read({&all, 1}, 4, {});
    EXPECT_TRUE(report.status.ok()) << report.status.ToString();
    return out;
  }
};

TEST_F(Steps, AreReadBackAsTheyWereWritten) {
  SP_ASSERT_OK(PutAll());
  const auto found = ListSteps(store, "", {});
  ASSERT_TRUE(found);
  ASSERT_EQ(found->size(), 1u);
  EXPECT_EQ(found->front().name, Name());
  EXPECT_EQ(ListSteps(store, "run-3", {}).value().size(), 1u);
  EXPECT_TRUE(ListSteps(store, "run", {}).value().empty());
  const auto read = ReadStoredStep(store, Name(), {});
  ASSERT_TRUE(read) << read.error().ToString();
  EXPECT_EQ(*read, step);
  EXPECT_TRUE(ReadAll(0) == contents[0]);
  EXPECT_TRUE(ReadAll(1) == contents[1]);
}

TEST_F(Steps, I24_WritingAgainChangesNothing) {
  SP_ASSERT_OK(PutAll());
  SP_ASSERT_OK(PutAll());
  EXPECT_TRUE(ReadAll(0) == contents[0]);
}

TEST_F(Steps, I23_AStoreThatDoesNotCompareChecksumsIsReadBack) {
  abilities.verifies_checksums = false;
  const auto by = PutShard(store, abilities, step.records[0], PutSource::OfMemory(contents[0]), {});
  ASSERT_TRUE(by);
  EXPECT_EQ(*by, ConfirmedBy::kReadingBack);
  const auto again = PutShard(store, StoreAbilities{true, true}, step.records[0], PutSource::OfMemory(contents[0]), {});
  EXPECT_EQ(again.value(), ConfirmedBy::kReadingBack) << "what was there before is not believed";
}

TEST_F(Steps, F66_FlippedOrCutInTheStoreIsNotConfirmed) {
  abilities.verifies_checksums = false;
  for (const FaultKind kind : {FaultKind::kFlipStored, FaultKind::kTruncateStored}) {
    step = Make(1200 + static_cast<uint64_t>(kind), 0);
    store.Add(MakeFault(StoreCall::kPut, kind));
    SP_EXPECT_CODE(kCorrupt, PutAll());
    SP_EXPECT_CODE(kNotFound, ReadStoredStep(store, {"run-3", step.records[0].key.step, step.records[0].attempt}, {}));
  }
}

// I-23: also of the small objects, which a restore needs as much as the shards.
TEST_F(Steps, F66_FlippedDocumentsAreNotConfirmed) {
  abilities.verifies_checksums = false;
  uint64_t number = 1300;
  for (const char* part : {"crc32c", "lineage", "manifest"}) {
    step = Make(number++, 0);
    Fault flip = MakeFault(StoreCall::kCreate, FaultKind::kFlipStored);
    flip.key_part = part;
    flip.at = 90;  // In the lineage a digit of its namespace's number, say: it reads well, and is another one.
    store.Add(flip);
    SP_EXPECT_CODE(kCorrupt, PutAll());
  }
}

TEST_F(Steps, MemoryThatNoLongerMatchesItsSealIsRefused) {
  contents[0][kBlockBytes + 5] ^= 1;
  SealRecord record = step.records[0];
  PutSource source = PutSource::OfMemory(contents[0]);
  SP_EXPECT_CODE(kCorrupt, PutShard(store, abilities, record, source, {}));
  contents[0][kBlockBytes + 5] ^= 1;
  source = PutSource::OfMemory(contents[0]);
  contents[0][kBlockBytes + 5] ^= 1;  // After the checksums were taken over.
  SP_EXPECT_CODE(kCorrupt, PutShard(store, abilities, record, source, {}));
}

TEST_F(Steps, F58_F60_AReplyThatWasLostIsAskedFor) {
  const Fault lost = MakeFault(StoreCall::kCreate, FaultKind::kFailAfter, 1, Status(StatusCode::kDeadline, "no reply"));
  for (int i = 0; i < 2; ++i) store.Add(lost);  // The checksums of rank 0, and again.
  int tries = 0;
  while (!PutAll().ok()) ASSERT_LT(++tries, 10);
  EXPECT_GT(tries, 0);
  EXPECT_EQ(ReadStoredStep(store, Name(), {}).value(), step);
}

TEST_F(Steps, F57_AnyCallMayFailAndTheStepIsWholeInTheEndAndNeverBefore) {
  for (const FaultKind kind : {FaultKind::kFailBefore, FaultKind::kFailAfter}) {
    for (int n = 1;; ++n) {
      MemoryStore fresh(clock);
      FaultyStore faulty(fresh, clock);
      int seen = 0;
      bool struck = false;
      for (const StoreCall call : {StoreCall::kHead, StoreCall::kPut, StoreCall::kCreate, StoreCall::kReadRange}) {
        faulty.Add(MakeFault(call, kind, static_cast<uint64_t>(n)));
      }
      Status status;
      do {
        status = [&]() -> Status {
          for (const SealRecord& record : step.records) {
            SP_ASSIGN_OR_RETURN([[maybe_unused]] const ConfirmedBy by, PutShard(faulty, {true, false}, record, PutSource::OfMemory(contents[record.rank]), {}));
          }
          return PutManifest(faulty, abilities, step, {});
        }();
        struck = struck || !status.ok();
        if (!status.ok() && !ReadStoredStep(fresh, Name(), {})) {
          EXPECT_TRUE(ListSteps(fresh, "", {}).value().empty());
        }
        ASSERT_LT(++seen, 20) << status.ToString();
      } while (!status.ok());
      EXPECT_EQ(ReadStoredStep(fresh, Name(), {}).value(), step);
      if (!struck) break;
    }
  }
}

TEST_F(Steps, F69_TwoDaemonsMayWriteOneStep) {
  SP_ASSERT_OK(PutAll());
  StoredStep other = step;
  other.lineage[0].ever_complete = false;  // What one of them did not know yet.
  SP_ASSERT_OK(PutManifest(store, abilities, other, {}));
  EXPECT_EQ(ReadStoredStep(store, Name(), {}).value(), step) << "the first one's lineage stays";
}

TEST_F(Steps, F68_WhatIsMissingIsNamed) {
  SP_ASSERT_OK(PutAll());
  SP_ASSERT_OK(memory.Delete(ChecksumsObjectKey(step.records[1]), {}));
  auto shard = StoredShard::Open(Shared(), step.records[1], {});
  ASSERT_FALSE(shard);
  EXPECT_EQ(shard.error().code(), StatusCode::kIncomplete);
  EXPECT_NE(shard.error().message().find("rank-1.crc32c"), std::string::npos);
  SP_ASSERT_OK(memory.Delete(ShardObjectKey(step.records[0]), {}));
  shard = StoredShard::Open(Shared(), step.records[0], {});
  ASSERT_TRUE(shard);
  const auto report = (*shard)->Verify(0, 4, 1, {});
  EXPECT_EQ(report.status.code(), StatusCode::kIncomplete);
  EXPECT_NE(report.status.message().find("rank-0.safetensors"), std::string::npos);
  SP_ASSERT_OK(memory.Delete(LineageObjectKey(step.records[0].key), {}));
  SP_EXPECT_CODE(kIncomplete, ReadStoredStep(store, Name(), {}));
  SP_ASSERT_OK(memory.Delete(ManifestObjectKey(step.records[0].key), {}));
  SP_EXPECT_CODE(kNotFound, ReadStoredStep(store, Name(), {}));
}

TEST_F(Steps, I35_DocumentsOfOthersAreRefused) {
  SP_ASSERT_OK(PutAll());
  const std::string prefix = Name().Prefix();
  const auto replace = [&](const std::string& name, const std::string& text) {
    SP_ASSERT_OK(memory.Delete(prefix + name, {}));
    ASSERT_TRUE(memory.Create(prefix + name, AsBytes(text), {}).value());
  };
  replace("lineage.json", "{}");
  SP_EXPECT_CODE(kCorrupt, ReadStoredStep(store, Name(), {}));
  replace("lineage.json", MakeLineage(step.lineage));
  replace("manifest.json", MakeManifest(Make(1201, 0).records));
  SP_EXPECT_CODE(kCorrupt, ReadStoredStep(store, Name(), {}));
  replace("manifest.json", "garbage");
  SP_EXPECT_CODE(kCorrupt, ReadStoredStep(store, Name(), {}));
}

TEST_F(Steps, RangesAreReadAndNothingElseIs) {
  SP_ASSERT_OK(PutAll());
  auto shard = StoredShard::Open(Shared(), step.records[0], {});
  ASSERT_TRUE(shard);
  const uint64_t length = contents[0].size();
  std::vector<std::vector<uint8_t>> out;
  std::vector<WantedRange> ranges;
  for (const auto& [offset, size] : std::vector<std::pair<uint64_t, uint64_t>>{{0, 1}, {kBlockBytes - 1, 2}, {5, kBlockBytes}, {length - 1, 1},
                                                                               {kBlockBytes, 2 * kBlockBytes}, {0, length}, {7, 0}}) {
    out.emplace_back(size);
    ranges.push_back({offset, size, out.back().data()});
  }
  for (const int requests : {1, 3}) {
    for (auto& o : out) std::fill(o.begin(), o.end(), uint8_t{0});
    const auto report = (*shard)->Read(ranges, requests, {});
    SP_ASSERT_OK(report.status);
    EXPECT_TRUE(report.target_modified);
    for (size_t i = 0; i < ranges.size(); ++i) {
      EXPECT_TRUE(std::equal(out[i].begin(), out[i].end(), contents[0].begin() + static_cast<ptrdiff_t>(ranges[i].offset))) << i;
    }
  }
  const WantedRange outside{length - 1, 2, out[0].data()};
  EXPECT_EQ((*shard)->Read({&outside, 1}, 1, {}).status.code(), StatusCode::kInvalidArgument);
}

TEST_F(Steps, I8_BlocksThatDoNotMatchAreNamed) {
  SP_ASSERT_OK(PutAll());
  auto shard = StoredShard::Open(Shared(), step.records[0], {});
  ASSERT_TRUE(shard);
  std::vector<uint8_t> damaged = contents[0];
  damaged[2 * kBlockBytes + 3] ^= 4;
  SP_ASSERT_OK(memory.Delete(ShardObjectKey(step.records[0]), {}));
  SP_ASSERT_OK(memory.Put(ShardObjectKey(step.records[0]), PutSource::OfMemory(damaged), {}));
  std::vector<uint8_t> out(10);
  const WantedRange good{kBlockBytes, 10, out.data()}, bad{3 * kBlockBytes - 5, 10, out.data()};
  EXPECT_TRUE((*shard)->Read({&good, 1}, 1, {}).status.ok());
  const auto report = (*shard)->Read({&bad, 1}, 1, {});
  EXPECT_EQ(report.status.code(), StatusCode::kCorrupt);
  EXPECT_EQ(report.corrupt_blocks, std::vector<uint64_t>{2});
  EXPECT_EQ((*shard)->Verify(0, 4, 2, {}).corrupt_blocks, std::vector<uint64_t>{2});
  EXPECT_TRUE((*shard)->Verify(0, 2, 2, {}).status.ok());
}

// A job that was rolled back saves smaller steps again: they are the newer ones. And nobody else's steps are seen.
TEST_F(Steps, I6_TheNewestAreThoseOfTheNewestGeneration) {
  const auto put = [&](uint32_t uid, uint64_t generation, uint64_t number) {
    StoredStep made;
    SealRecord record;
    record.key = {uid, "run-3", generation, {}, number, 0};
    record.attempt = record.key.AttemptId();
    record.world_size = 1;
    record.length_bytes = 100;
    record.header_bytes = 64;
    record.static_offset = 32;
    const std::vector<uint8_t> content = Bytes(record.length_bytes, 1);
    record.block_root = BlockRoot(PutSource::OfMemory(content).block_crcs);
    SP_ASSERT_OK(PutShard(store, abilities, record, PutSource::OfMemory(content), {}));
    made.records = {record};
    made.lineage = {ledger::Generation{uid, "run-3", generation, {}, 1, false, {}, 0, 0, false, true}};
    SP_ASSERT_OK(PutManifest(store, abilities, made, {}));
  };
  for (uint64_t number = 10; number <= 60; number += 10) put(1000, 1, number);
  for (const uint64_t number : {20, 30}) put(1000, 2, number);
  for (uint64_t number = 100; number <= 300; number += 10) put(2000, 9, number);
  const auto newest = ReadNewestSteps(store, "run-3", 1000, 4, 100, {});
  ASSERT_TRUE(newest) << newest.error().ToString();
  SP_ASSERT_OK(newest->damaged);
  std::vector<std::pair<uint64_t, uint64_t>> seen;
  for (const StoredStep& s : newest->steps) seen.emplace_back(s.records[0].key.generation, s.records[0].key.step);
  EXPECT_EQ(seen, (std::vector<std::pair<uint64_t, uint64_t>>{{2, 30}, {2, 20}, {1, 60}, {1, 50}}));
  EXPECT_EQ(ReadNewestSteps(store, "run-3", 1000, 4, 2, {})->steps.size(), 2u) << "no more shards than asked for";
  EXPECT_EQ(ReadNewestSteps(store, "run-3", 1000, 4, 0, {})->steps.size(), 1u) << "but one step";
  EXPECT_TRUE(ReadNewestSteps(store, "run-3", 7, 4, 100, {})->steps.empty());
}

TEST_F(Steps, F68_ADamagedNewestStepIsTold) {
  SP_ASSERT_OK(PutAll());
  step = Make(1300, 0);
  SP_ASSERT_OK(PutAll());
  SP_ASSERT_OK(memory.Delete(LineageObjectKey(step.records[0].key), {}));
  const auto newest = ReadNewestSteps(store, "run-3", 1000, 4, 100, {});
  ASSERT_TRUE(newest);
  EXPECT_EQ(newest->damaged.code(), StatusCode::kIncomplete);
  EXPECT_NE(newest->damaged.message().find("step-1300"), std::string::npos);
  EXPECT_EQ(newest->steps.size(), 1u);
}

TEST_F(Steps, F61_UploadsOfTheDeadAreAborted) {
  memory.LeaveUnfinishedUpload(ShardObjectKey(step.records[0]));
  memory.LeaveUnfinishedUpload(ShardObjectKey(Make(1201, 0).records[0]));
  memory.LeaveUnfinishedUpload("somebody/elses/upload");
  EXPECT_EQ(SweepUploads(store, "", 0, {}).value(), 0u) << "they may still be written to";
  EXPECT_EQ(SweepUploads(store, Name().Prefix(), std::numeric_limits<int64_t>::max(), {}).value(), 1u);
  EXPECT_EQ(SweepUploads(store, "", std::numeric_limits<int64_t>::max(), {}).value(), 1u);
  ASSERT_EQ(memory.ListUploads("", {}).value().size(), 1u);
  EXPECT_EQ(memory.ListUploads("", {}).value()[0].key, "somebody/elses/upload");
}

TEST_F(Steps, DeletingTakesTheManifestFirstAndNothingForeign) {
  SP_ASSERT_OK(PutAll());
  const std::string prefix = Name().Prefix();
  ASSERT_TRUE(memory.Create(prefix + "notes.txt", AsBytes("mine"), {}).value());
  store.Add(MakeFault(StoreCall::kDelete, FaultKind::kFailBefore, 2));
  SP_EXPECT_CODE(kUnavailable, DeleteStep(store, Name(), {}));
  SP_EXPECT_CODE(kNotFound, ReadStoredStep(store, Name(), {}));
  SP_ASSERT_OK(DeleteStep(store, Name(), {}));
  const auto left = memory.List("", "", {});
  ASSERT_EQ(left->objects.size(), 1u);
  EXPECT_EQ(left->objects[0].key, prefix + "notes.txt");
}

}  // namespace
}  // namespace sp
