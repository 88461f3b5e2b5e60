#include "client/task_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>

#include "client/keep_alive.h"
#include "os/test_util.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

TEST(TaskPool, RunsSeveralAtOnceRefusesTooManyAndStopFinishesAll) {
  TaskPool pool(2, 3);
  std::latch both(2);
  std::latch go_on(1);
  std::atomic<int> done = 0;
  for (int i = 0; i < 2; ++i) {
    SP_ASSERT_OK(pool.Add([&] {
      both.count_down();
      go_on.wait();
      ++done;
    }));
  }
  both.wait();
  SP_ASSERT_OK(pool.Add([&] { ++done; }));
  SP_EXPECT_CODE(kLimit, pool.Add([] {}));
  EXPECT_FALSE(pool.WaitIdle(MonotonicNow()));
  go_on.count_down();
  EXPECT_TRUE(pool.WaitIdle(MonotonicNow() + 20 * kNanosPerSecond));
  EXPECT_EQ(done, 3);
  SP_ASSERT_OK(pool.Add([&] { ++done; }));
  pool.Stop();
  EXPECT_EQ(done, 4);
  SP_EXPECT_CODE(kClosed, pool.Add([] {}));
}

TEST(KeepAlive, CallsUntilToldOtherwise) {
  KeepAlive keep_alive;
  std::latch three(3);
  std::atomic<int> calls = 0;
  SP_ASSERT_OK(keep_alive.Add(kNanosPerMilli, [&] {
    three.count_down();
    return ++calls < 3;
  }));
  three.wait();
  std::latch other(5);
  std::atomic<int> left = 5;
  SP_ASSERT_OK_AND_ASSIGN(const uint64_t id, keep_alive.Add(kNanosPerMilli, [&] {
    if (left.fetch_sub(1) > 0) other.count_down();
    return true;
  }));
  other.wait();  // Five more periods, in which the first was not called again.
  keep_alive.Remove(id);
  keep_alive.Stop();
  EXPECT_EQ(calls, 3);
  SP_EXPECT_CODE(kClosed, keep_alive.Add(1, [] { return true; }));
}

}  // namespace
}  // namespace sp
