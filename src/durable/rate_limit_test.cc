#include "durable/rate_limit.h"

#include <gtest/gtest.h>

namespace sp {
namespace {

constexpr Nanos kStart = 100 * kNanosPerSecond;

TEST(RateLimit, SpreadsWhatIsTakenOverTime) {
  RateLimit limit(1000);
  EXPECT_EQ(limit.Take(kStart, 500), kStart);
  EXPECT_EQ(limit.Take(kStart, 500), kStart + kNanosPerSecond / 2);
  EXPECT_EQ(limit.Take(kStart, 2500), kStart + kNanosPerSecond);
  EXPECT_EQ(limit.Take(kStart, 1), kStart + 7 * kNanosPerSecond / 2);
}

TEST(RateLimit, IdleTimeIsNotSaved) {
  RateLimit limit(1000);
  limit.Take(kStart, 1000);
  EXPECT_EQ(limit.Take(kStart + 60 * kNanosPerSecond, 1000), kStart + 60 * kNanosPerSecond);
  EXPECT_EQ(limit.Take(kStart + 60 * kNanosPerSecond, 1), kStart + 61 * kNanosPerSecond);
}

TEST(RateLimit, ZeroIsNone) {
  RateLimit limit(0);
  EXPECT_EQ(limit.Take(kStart, UINT64_MAX), kStart);
  EXPECT_EQ(limit.Take(kStart, 1), kStart);
}

}  // namespace
}  // namespace sp
