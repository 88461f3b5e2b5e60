#include "catalog/catalog.h"

#include <gtest/gtest.h>

#include "format/manifest.h"

namespace sp {
namespace {

const NamespaceKey kNs{1000, "job"};
const Id128 kNode = [] { Id128 id; id.bytes.fill(1); return id; }();

Hash256 Structure(uint8_t n) {
  Hash256 h;
  h.bytes.fill(n);
  return h;
}

class CatalogTest : public ::testing::Test {
 protected:
  void Open(uint64_t number, bool fresh = false) { catalog.AddGeneration({1000, "job", number, Nonce(number), 1, false, {}, 0, 0, fresh, false}); }
  void OpenFrom(uint64_t number, const AttemptKey& parent) {
    catalog.AddGeneration({1000, "job", number, Nonce(number), 1, true, parent.AttemptId(), parent.generation, parent.step, false, false});
  }
  static Id128 Nonce(uint64_t n) {
    Id128 id;
    id.bytes.fill(static_cast<uint8_t>(n));
    return id;
  }
  static AttemptKey Key(uint64_t step, uint64_t generation = 1, uint32_t try_number = 0) { return {1000, "job", generation, Nonce(generation), step, try_number}; }
  static SealRecord Record(const AttemptKey& key, uint32_t world = 1, uint32_t rank = 0) {
    SealRecord r;
    r.key = key;
    r.attempt = key.AttemptId();
    r.world_size = world;
    r.rank = rank;
    r.length_bytes = 100;
    r.structure = Structure(static_cast<uint8_t>(1 + rank));
    return r;
  }
  void AddShard(const SealRecord& r) {
    catalog.AddRecord(r);
    catalog.AddCopyReport({r.Identity(), kNode, kNode, true});
  }
  // All shards and the manifest.
  Id128 Complete(const AttemptKey& key, uint32_t world = 1) {
    std::vector<SealRecord> records;
    for (uint32_t rank = 0; rank < world; ++rank) {
      records.push_back(Record(key, world, rank));
      AddShard(records.back());
    }
    catalog.AddManifest(ManifestRecord(records, MakeManifest(records)));
    return key.AttemptId();
  }
  AttemptState State(const AttemptKey& key) { return catalog.StateOf(*catalog.FindAttempt(kNs, key.AttemptId())); }
  std::vector<uint64_t> Steps() {
    std::vector<uint64_t> steps;
    for (const Attempt* a : catalog.Lineage(kNs, Level::kMemory)) steps.push_back(a->key.step);
    return steps;
  }
  std::vector<uint64_t> Retirable(uint32_t retain, const std::set<Id128>& pinned = {}) {
    std::vector<uint64_t> steps;
    for (const Attempt* a : catalog.Retirable(kNs, retain, pinned)) steps.push_back(a->key.step);
    std::sort(steps.begin(), steps.end());
    return steps;
  }
  void Close(const AttemptKey& key, ledger::TombstoneWhy why) { catalog.AddTombstone({1000, "job", key.AttemptId(), why, "test"}); }
  std::shared_ptr<PackedIndex> Piece(uint64_t offset, uint64_t global) {
    ShardIndex i;
    i.pieces.push_back({"w", "F32", {1}, {offset}, {global}, 0, 4});
    i.data_bytes = 4;
    return PackedIndex::Of(i);
  }

  Catalog catalog;
};

using Steps_ = std::vector<uint64_t>;

TEST_F(CatalogTest, TransitionsOfAnAttempt) {  // I-1, I-16
  Open(1);
  catalog.AddAttempt(Key(5), 2);
  EXPECT_EQ(State(Key(5)), AttemptState::kOpen);
  AddShard(Record(Key(5), 2, 0));
  EXPECT_EQ(State(Key(5)), AttemptState::kOpen);
  AddShard(Record(Key(5), 2, 1));
  EXPECT_EQ(State(Key(5)), AttemptState::kOpen);  // Without the manifest it is not complete.
  Complete(Key(5), 2);
  EXPECT_EQ(State(Key(5)), AttemptState::kComplete);
  Close(Key(5), ledger::TombstoneWhy::kRetired);
  EXPECT_EQ(State(Key(5)), AttemptState::kRetired);
  Complete(Key(5), 2);
  EXPECT_EQ(State(Key(5)), AttemptState::kRetired);  // A tombstone beats the records.
  Close(Key(5), ledger::TombstoneWhy::kClosed);
  EXPECT_EQ(State(Key(5)), AttemptState::kRetired);  // The first one counts.
}

TEST_F(CatalogTest, ATombstoneMayComeBeforeItsRecords) {
  Open(1);
  Close(Key(5), ledger::TombstoneWhy::kClosed);
  Complete(Key(5));
  EXPECT_EQ(State(Key(5)), AttemptState::kClosed);
  EXPECT_EQ(Steps(), Steps_{});
}

TEST_F(CatalogTest, FactsInAnyOrderGiveTheSameAnswer) {  // Set union (reliability, section 2).
  std::vector<SealRecord> records = {Record(Key(5), 3, 0), Record(Key(5), 3, 1), Record(Key(5), 3, 2)};
  const SealRecord manifest = ManifestRecord(records, MakeManifest(records));
  std::vector<int> order = {0, 1, 2, 3, 4};
  do {
    Catalog c;
    for (int what : order) {
      if (what < 3) {
        c.AddRecord(records[static_cast<size_t>(what)]);
        c.AddCopyReport({records[static_cast<size_t>(what)].Identity(), kNode, kNode, true});
      } else if (what == 3) {
        c.AddManifest(manifest);
      } else {
        c.AddGeneration({1000, "job", 1, Nonce(1), 3, false, {}, 0, 0, false, false});
      }
    }
    ASSERT_EQ(c.Lineage(kNs, Level::kMemory).size(), 1u);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST_F(CatalogTest, TwoRecordsForOneRankAreCorruptNeverAChoice) {  // F82, I-3
  Open(1);
  Complete(Key(5));
  SealRecord other = Record(Key(5));
  other.block_root.bytes[0] = 9;
  catalog.AddRecord(other);
  EXPECT_EQ(State(Key(5)), AttemptState::kCorrupt);
  EXPECT_EQ(Steps(), Steps_{});
  SealRecord wider = Record(Key(6), 2, 1);
  AddShard(Record(Key(6), 1, 0));
  catalog.AddRecord(wider);
  EXPECT_EQ(State(Key(6)), AttemptState::kCorrupt);
}

TEST_F(CatalogTest, CompletableNeedsAllRanksAllStructuresAndFullCoverage) {  // I-1
  Open(1);
  const Id128 id = Key(5).AttemptId();
  EXPECT_EQ(catalog.Completable(kNs, id).error().code(), StatusCode::kNotFound);
  AddShard(Record(Key(5), 2, 0));
  EXPECT_EQ(catalog.Completable(kNs, id).error().code(), StatusCode::kIncomplete);
  AddShard(Record(Key(5), 2, 1));
  EXPECT_EQ(catalog.Completable(kNs, id).error().code(), StatusCode::kIncomplete);
  EXPECT_TRUE(catalog.AddStructure(1000, Structure(1), Piece(0, 2)).ok());
  EXPECT_EQ(catalog.Completable(kNs, id).error().code(), StatusCode::kIncomplete);
  EXPECT_TRUE(catalog.AddStructure(1000, Structure(2), Piece(1, 2)).ok());
  EXPECT_EQ(catalog.Completable(kNs, id)->size(), 2u);
  Close(Key(5), ledger::TombstoneWhy::kClosed);
  EXPECT_EQ(catalog.Completable(kNs, id).error().code(), StatusCode::kClosed);
}

TEST_F(CatalogTest, AGapOrAnOverlapIsNeverCompletable) {
  Open(1);
  AddShard(Record(Key(5), 2, 0));
  AddShard(Record(Key(5), 2, 1));
  EXPECT_TRUE(catalog.AddStructure(1000, Structure(1), Piece(0, 3)).ok());
  EXPECT_TRUE(catalog.AddStructure(1000, Structure(2), Piece(1, 3)).ok());
  EXPECT_EQ(catalog.Completable(kNs, Key(5).AttemptId()).error().code(), StatusCode::kCorrupt);
}

TEST_F(CatalogTest, LevelsFallWithTheirCopies) {  // I-2, I-12
  Catalog two(1);
  SealRecord r = Record(Key(5));
  two.AddGeneration({1000, "job", 1, Nonce(1), 1, false, {}, 0, 0, false, false});
  two.AddRecord(r);
  two.AddManifest(ManifestRecord({r}, MakeManifest({r})));
  const Attempt& a = *two.FindAttempt(kNs, r.attempt);
  EXPECT_EQ(two.StateOf(a), AttemptState::kCorrupt);  // Nobody can serve it.
  Id128 other = kNode;
  other.bytes[0] = 7;
  two.AddCopyReport({r.Identity(), kNode, kNode, true});
  EXPECT_EQ(two.LevelOf(a), Level::kMemory);
  two.AddCopyReport({r.Identity(), other, other, true});
  EXPECT_EQ(two.LevelOf(a), Level::kReplicated);
  two.AddQuarantine(r.Identity(), {r.Identity(), other, other, false});
  EXPECT_EQ(two.LevelOf(a), Level::kMemory);
  two.AddCopyReport({r.Identity(), kNode, kNode, false});
  EXPECT_EQ(two.LevelOf(a), Level::kNone);
  EXPECT_TRUE(two.Lineage(kNs, Level::kMemory).empty());
  EXPECT_NE(two.InfoOf(a).reason.find("rank 0"), std::string::npos);
}

TEST_F(CatalogTest, LineageFollowsParentsNotNumbers) {  // I-6
  Open(1);
  for (uint64_t step : {0, 100, 200, 300}) Complete(Key(step));
  EXPECT_EQ(Steps(), (Steps_{300, 200, 100, 0}));
  OpenFrom(2, Key(100));  // Rolled back: 200 and 300 are another branch.
  EXPECT_EQ(Steps(), (Steps_{100, 0}));
  Complete(Key(150, 2));
  EXPECT_EQ(Steps(), (Steps_{150, 100, 0}));
  OpenFrom(3, Key(150, 2));
  EXPECT_EQ(Steps(), (Steps_{150, 100, 0}));
  Open(4, true);
  EXPECT_EQ(Steps(), Steps_{});
  EXPECT_TRUE(catalog.LineageBeginsFresh(kNs));
  EXPECT_FALSE(catalog.LineageEverComplete(kNs));
}

TEST_F(CatalogTest, OfTwoTriesTheLaterCounts) {  // F80
  Open(1);
  Complete(Key(7, 1, 0));
  const Id128 second = Complete(Key(7, 1, 2));
  Complete(Key(7, 1, 1));
  ASSERT_EQ(Steps(), Steps_{7});
  EXPECT_EQ(catalog.Lineage(kNs, Level::kMemory)[0]->key.AttemptId(), second);
}

TEST_F(CatalogTest, RetirementKeepsTheNewestAndThePinned) {  // I-14, I-17
  Open(1);
  for (uint64_t step = 1; step <= 4; ++step) Complete(Key(step));
  EXPECT_EQ(Retirable(2), (Steps_{1, 2}));
  EXPECT_EQ(Retirable(4), Steps_{});
  EXPECT_EQ(Retirable(2, {Key(1).AttemptId()}), Steps_{2});
  catalog.SetOperatorPin({1000, "job", Key(2).AttemptId(), true});
  EXPECT_EQ(Retirable(2), Steps_{1});
  EXPECT_EQ(Retirable(1), (Steps_{1, 3}));
}

TEST_F(CatalogTest, NeverTheLastAndNeverBeforeANewerOneIsComplete) {  // I-14, B4
  Open(1);
  Complete(Key(1));
  EXPECT_EQ(Retirable(1), Steps_{});
  catalog.AddAttempt(Key(2), 1);
  AddShard(Record(Key(2)));
  EXPECT_EQ(Retirable(1), Steps_{});  // 2 is not complete.
  Open(2, true);
  EXPECT_EQ(Retirable(1), Steps_{});  // A new lineage that has nothing yet.
  Complete(Key(1, 2));
  EXPECT_EQ(Retirable(1), Steps_{1});
}

TEST_F(CatalogTest, AnAbandonedBranchGoesOnlyWhenItIsOvertaken) {  // I-14
  Open(1);
  for (uint64_t step : {100, 200}) Complete(Key(step));
  OpenFrom(2, Key(100));
  EXPECT_EQ(Retirable(1), Steps_{});
  Complete(Key(110, 2));
  EXPECT_EQ(Retirable(1), (Steps_{100, 200}));
}

TEST_F(CatalogTest, ACorruptStepGoesWhenANewerOneIsThere) {
  Open(1);
  Complete(Key(1));
  catalog.AddQuarantine(Record(Key(1)).Identity(), {Record(Key(1)).Identity(), kNode, kNode, false});
  EXPECT_EQ(Retirable(1), Steps_{});
  Complete(Key(2));
  EXPECT_EQ(Retirable(1), Steps_{1});
}

TEST_F(CatalogTest, LostAndNeverAreApart) {  // I-31
  EXPECT_FALSE(catalog.LineageEverComplete(kNs));
  Open(1);
  EXPECT_FALSE(catalog.LineageEverComplete(kNs));
  Complete(Key(1));
  EXPECT_TRUE(catalog.LineageEverComplete(kNs));
  Close(Key(1), ledger::TombstoneWhy::kRetired);
  EXPECT_TRUE(catalog.LineageEverComplete(kNs));
}

TEST_F(CatalogTest, TombstonesAreBoundedTheOldestGo) {  // I-27
  Open(1);
  for (uint64_t step = 0; step < Catalog::kTombstonesKept + 10; ++step) Close(Key(step), ledger::TombstoneWhy::kClosed);
  const auto kept = catalog.Tombstones(kNs);
  ASSERT_EQ(kept.size(), Catalog::kTombstonesKept);
  EXPECT_EQ(kept.front().attempt, Key(10).AttemptId());
  EXPECT_EQ(kept.back().attempt, Key(Catalog::kTombstonesKept + 9).AttemptId());
  EXPECT_EQ(catalog.FindAttempt(kNs, Key(9).AttemptId()), nullptr);
}

TEST_F(CatalogTest, ATombstoneKeepsNoRecords) {  // I-27: 128 attempts of up to 65,536 ranks each, in every namespace.
  Open(1);
  Complete(Key(1), 3);
  Close(Key(1), ledger::TombstoneWhy::kRetired);
  AddShard(Record(Key(1), 3, 1));
  const Attempt* attempt = catalog.FindAttempt(kNs, Key(1).AttemptId());
  EXPECT_TRUE(attempt->records.empty());
  EXPECT_TRUE(attempt->identities.empty());
  EXPECT_EQ(State(Key(1)), AttemptState::kRetired);
  EXPECT_EQ(catalog.Tombstones(kNs).size(), 1u);
}

TEST_F(CatalogTest, TrimForgetsWhatOnlyTheGoneReferTo) {
  Open(1);
  Complete(Key(1));
  EXPECT_TRUE(catalog.AddStructure(1000, Structure(1), Piece(0, 1)).ok());
  EXPECT_TRUE(catalog.AddStructure(1000, Structure(9), Piece(0, 1)).ok());
  catalog.AddQuarantine(Record(Key(8)).Identity(), {Record(Key(8)).Identity(), kNode, kNode, false});
  catalog.Trim();
  EXPECT_TRUE(catalog.StructureDataBytes(1000, Structure(1)));
  EXPECT_FALSE(catalog.StructureDataBytes(1000, Structure(9)));
  EXPECT_TRUE(catalog.quarantined().empty());
  EXPECT_EQ(Steps(), Steps_{1});
}

TEST(Structures, EqualListsOfNamesAreKeptOnceAndCheckedOnesMakeRoom) {  // I-27
  const auto index = [](const std::string& name, int names = 1000) {
    ShardIndex i{{{name, "F32", {1}, {0}, {1}, 0, 4}}, {}, 4, {}};
    for (int n = 0; n < names; ++n) i.expected.Add(name.substr(0, 1));
    return PackedIndex::Of(i);
  };
  const uint64_t list = index("a1")->expected->cost(), one = index("a1")->cost(), budget = list + 3 * one;
  Structures structures;
  EXPECT_TRUE(structures.Add(Structure(1), index("a1"), budget).ok());
  EXPECT_EQ(structures.cost(), one + list);
  EXPECT_TRUE(structures.Add(Structure(2), index("a2"), budget).ok());
  EXPECT_EQ(structures.cost(), 2 * one + list);
  EXPECT_EQ(structures.Add(Structure(3), index("b1"), budget).code(), StatusCode::kLimit) << "another list";
  EXPECT_FALSE(structures.DataBytes(Structure(3)));
  EXPECT_TRUE(structures.Add(Structure(3), index("a3"), budget).ok());
  EXPECT_EQ(structures.Add(Structure(4), index("a4"), budget).code(), StatusCode::kLimit);
  EXPECT_FALSE(structures.Coverage({Structure(1), Structure(9)}));
  EXPECT_TRUE(structures.Coverage({Structure(2), Structure(1)}));  // "a" is missing: an answer, too.
  EXPECT_TRUE(structures.Add(Structure(4), index("a4"), budget).ok());
  EXPECT_FALSE(structures.IsKept(Structure(2))) << "the one unused for longest";
  EXPECT_EQ(structures.DataBytes(Structure(2)), 4u) << "still known";
  EXPECT_TRUE(structures.Coverage({Structure(2), Structure(1)})) << "the answer is remembered";
  EXPECT_FALSE(structures.Coverage({Structure(1), Structure(2)})) << "another set";
  structures.Trim({Structure(3), Structure(4)}, {Structure(3)});
  EXPECT_EQ(structures.cost(), 2 * one + list);
  EXPECT_TRUE(structures.Add(Structure(5), index("b5"), budget + 100).code() == StatusCode::kLimit) << "3 waits for its check";
  structures.Trim({}, {});
  EXPECT_EQ(structures.cost(), 0u);
  EXPECT_TRUE(structures.empty());
}

TEST_F(CatalogTest, IdentitiesDoNotMeet) {  // I-38
  Open(1);
  Complete(Key(1));
  EXPECT_EQ(catalog.FindAttempt({1001, "job"}, Key(1).AttemptId()), nullptr);
  EXPECT_TRUE(catalog.Lineage({1001, "job"}, Level::kMemory).empty());
  EXPECT_EQ(catalog.CurrentGeneration({1001, "job"}), nullptr);
}

}  // namespace
}  // namespace sp
