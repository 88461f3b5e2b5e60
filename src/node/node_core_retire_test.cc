// What memory keeps beyond the newest steps: retain_every, retain_for, and that both give way to a save.
#include <utility>

#include "node/node_core_harness.h"

namespace sp {
namespace {

using H = NodeCoreHarness;
using Steps = std::vector<uint64_t>;

struct Retire : testing::Test {
  // A pool of so many steps of one rank, each of one extent.
  H::Writer Start(uint32_t extents, uint64_t every, Nanos within, uint32_t retain = 1) {
    h = std::make_unique<H>(extents, retain);
    h->config.retain_every = every;
    h->config.retain_for = within;
    h->Restart();
    return h->Open(h->Connect(1), 1);
  }
  std::unique_ptr<H> h;
};

TEST_F(Retire, MultiplesStayWhileThereIsMemory) {
  const H::Writer w = Start(8, 10, 0);
  for (const uint64_t step : {5, 10, 15, 20, 25, 30, 35}) h->Save(w, step);
  EXPECT_EQ(h->Steps(w.client), (Steps{35, 30, 20, 10}));
}

TEST_F(Retire, TheOldestOfThemGivesWayToASaveAndTheNewestNever) {
  H::Writer w = Start(4, 1, 0);
  for (uint64_t step = 1; step <= 20; ++step) {
    h->Save(w, step);
    EXPECT_EQ(h->LatestStep(w.client), step);
  }
  EXPECT_EQ(h->Steps(w.client), (Steps{20, 19, 18, 17}));
  // What is being written has its memory; the newest complete one keeps its own (I-14).
  w = Start(2, 1, 0);
  h->Save(w, 1);
  h->Save(w, 2);
  h->Reserve(w, 3);
  EXPECT_EQ(h->Steps(w.client), Steps{2});
  EXPECT_EQ(h->TryReserve(w, 4).status, StatusCode::kNoSpace);
  EXPECT_EQ(h->Steps(w.client), Steps{2});
}

TEST_F(Retire, WhatIsPinnedDoesNotGiveWay) {
  const H::Writer w = Start(3, 1, 0);
  for (const uint64_t step : {1, 2, 3}) h->Save(w, step);
  OpenReadRequest oldest;
  oldest.step = 1;
  oldest.choice = ReadChoice::kStep;
  ASSERT_EQ(h->TryRead(w.client, oldest).status, StatusCode::kOk);
  h->Save(w, 4);
  EXPECT_EQ(h->Steps(w.client), (Steps{4, 3, 1}));
}

// I-10: memory of another living process is no help, so nothing is lost for it.
TEST_F(Retire, NothingGivesWayInVain) {
  const H::Writer w = Start(3, 1, 0);
  for (const uint64_t step : {1, 2, 3}) h->Save(w, step);
  const H::Writer other = h->Open(h->Connect(2), 2, 1, 0, ParentMode::kLatest, {}, "other");
  EXPECT_EQ(h->TryReserve(other, 1).status, StatusCode::kNoSpace);
  EXPECT_EQ(h->Steps(w.client), (Steps{3, 2, 1}));
  h->Die(w.client);
  h->Save(other, 2);  // The refused try is used up.
  EXPECT_EQ(h->Steps(other.client), (Steps{3, 2}));
}

TEST_F(Retire, StepsStayForAsLongAsTheRuleSaysBeforeTheNewest) {
  const H::Writer w = Start(8, 0, 100 * kNanosPerSecond);
  const auto save_after = [&](Nanos pause, uint64_t step) {
    h->now += pause;
    h->Save(w, step);
  };
  save_after(0, 1);
  save_after(60 * kNanosPerSecond, 2);
  EXPECT_EQ(h->Steps(w.client), (Steps{2, 1}));
  save_after(60 * kNanosPerSecond, 3);
  EXPECT_EQ(h->Steps(w.client), (Steps{3, 2}));
  h->Advance(3600 * kNanosPerSecond);  // The job stands still.
  EXPECT_EQ(h->Steps(w.client), (Steps{3, 2}));
  save_after(0, 4);
  EXPECT_EQ(h->Steps(w.client), Steps{4});
}

TEST_F(Retire, ARestartedWorkerCountsFromItsStart) {
  H::Writer w = Start(8, 0, 100 * kNanosPerSecond);
  h->Save(w, 1);
  h->now += 60 * kNanosPerSecond;
  h->Save(w, 2);
  h->now += 90 * kNanosPerSecond;
  h->Restart();
  w.client = h->Reconnect(w.client);
  h->Save(w, 3);
  EXPECT_EQ(h->Steps(w.client), (Steps{3, 2, 1}));
  h->now += 110 * kNanosPerSecond;
  h->Save(w, 4);
  EXPECT_EQ(h->Steps(w.client), Steps{4});
}

}  // namespace
}  // namespace sp
