#include "node/drainer.h"

#include <gtest/gtest.h>

#include "durable/step_store.h"

namespace sp {
namespace {

constexpr uint64_t kGB = 1'000'000'000;

TEST(Drainer, AShardHasTimeForItsShareOfThePaceThereAndBack) {
  // Eight shards at 16 MB/s in all: 2 MB/s each would be 5,000 s one way; the floor is that of a slow store, 1 MB/s in all.
  EXPECT_GE(ShardWithin(10 * kGB, 8, 16'000'000), 2 * 10'000 * kNanosPerSecond);
  EXPECT_GE(ShardWithin(kGB, 8, 400'000), 2 * 20'000 * kNanosPerSecond);  // 50 kB/s each.
  EXPECT_GE(ShardWithin(0, 16, 0), 60 * kNanosPerSecond);
  EXPECT_GE(ShardWithin(kGB, 16, 1), kNanosPerSecond);  // Slower than a byte per second each.
  // I-24: what is younger than half of T_abort is never swept, however slow it is.
  EXPECT_LE(ShardWithin(~uint64_t{0}, 16, 1), 60 * kNanosPerSecond + kUnfinishedForSeconds * kNanosPerSecond / 2);
}

}  // namespace
}  // namespace sp
