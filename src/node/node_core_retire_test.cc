// What memory keeps beyond the newest steps: retain_every and retain_for, up to retain_max.
#include <utility>

#include "node/node_core_harness.h"

namespace sp {
namespace {

using H = NodeCoreHarness;
using Steps = std::vector<uint64_t>;

struct Retire : testing::Test {
  // A pool of so many steps of one rank, each of one extent; one step is kept in any case.
  H::Writer Start(uint32_t extents, uint64_t every, Nanos within, uint32_t retain_max) {
    h = std::make_unique<H>(extents, 1);
    h->config.retain_every = every;
    h->config.retain_for = within;
    h->config.retain_max = retain_max;
    h->Restart();
    return h->Open(h->Connect(1), 1);
  }
  std::unique_ptr<H> h;
};

TEST_F(Retire, TheNewestMultiplesStayUpToTheMost) {
  const H::Writer w = Start(8, 10, 0, 3);
  for (const uint64_t step : {5, 10, 15, 20, 25, 30, 35}) h->Save(w, step);
  EXPECT_EQ(h->Steps(w.client), (Steps{35, 30, 20}));
}

// I-30: a pool of one step more than is kept is enough for ever, whatever the launches do.
TEST_F(Retire, APoolOfOneStepMoreIsEnough) {
  H::Writer w = Start(4, 1, 1000 * kNanosPerSecond, 3);
  Id128 oldest;
  for (uint64_t step = 1; step <= 20; ++step) {
    const Id128 saved = h->Save(w, step);
    if (step == 18) oldest = saved;
    EXPECT_EQ(h->LatestStep(w.client), step);
  }
  EXPECT_EQ(h->Steps(w.client), (Steps{20, 19, 18}));
  // A launch that goes back, and one that begins anew: what they left behind goes with the first step that is newer.
  h->Die(w.client);
  w = h->Open(h->Connect(2), 2, 1, 0, ParentMode::kAttempt, oldest);
  for (const uint64_t step : {19, 20, 21}) h->Save(w, step);
  EXPECT_EQ(h->Steps(w.client), (Steps{21, 20, 19}));
  h->Die(w.client);
  w = h->Open(h->Connect(3), 3, 1, 0, ParentMode::kFresh);
  for (const uint64_t step : {1, 2, 3, 4}) h->Save(w, step);
  EXPECT_EQ(h->Steps(w.client), (Steps{4, 3, 2}));
}

TEST_F(Retire, ThePoolsUsersAreToldTheMost) {
  Start(8, 10, 0, 3);
  EXPECT_EQ(h->StatusView()["retain"], 3);
  h->config.retain_every = 0;
  h->Restart();
  EXPECT_EQ(h->StatusView()["retain"], 1);
}

TEST_F(Retire, StepsStayForAsLongAsTheRuleSaysBeforeTheNewest) {
  const H::Writer w = Start(8, 0, 100 * kNanosPerSecond, 8);
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
  H::Writer w = Start(8, 0, 100 * kNanosPerSecond, 8);
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
