#include "os/fd.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include "os/test_util.h"

namespace sp {
namespace {

TEST(Fd, ClosesWhenItGoesAndWhenReplaced) {
  const int before = CountOpenFds();
  {
    SP_ASSERT_OK_AND_ASSIGN(Pipe pipe, Pipe::Create());
    EXPECT_EQ(CountOpenFds(), before + 2);
    pipe.read_end = std::move(pipe.write_end);
    EXPECT_EQ(CountOpenFds(), before + 1);
    EXPECT_FALSE(pipe.write_end.valid());
    SP_ASSERT_OK_AND_ASSIGN(Fd copy, pipe.read_end.Duplicate());
    EXPECT_EQ(CountOpenFds(), before + 2);
    EXPECT_EQ(::fcntl(copy.get(), F_GETFD), FD_CLOEXEC);
  }
  EXPECT_EQ(CountOpenFds(), before);
}

TEST(Fd, SelfMoveKeepsIt) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe pipe, Pipe::Create());
  Fd& alias = pipe.read_end;
  pipe.read_end = std::move(alias);
  EXPECT_NE(::fcntl(pipe.read_end.get(), F_GETFD), -1);
}

TEST(Fd, DuplicateReportsTheLimit) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe pipe, Pipe::Create());
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = 4;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &tight), 0);
  const Result<Fd> copy = pipe.read_end.Duplicate();
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  SP_EXPECT_CODE(kLimit, copy);
}

TEST(EnsureFdLimit, RaisesTheSoftLimitAndRefusesMoreThanTheHardOne) {
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit before = limit;
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_cur, 64);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  SP_ASSERT_OK(EnsureFdLimit(65));
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_EQ(limit.rlim_cur, before.rlim_max);
  if (before.rlim_max != RLIM_INFINITY) SP_EXPECT_CODE(kLimit, EnsureFdLimit(before.rlim_max + 1));
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST(EventFd, CountsNotifications) {
  SP_ASSERT_OK_AND_ASSIGN(const EventFd event, EventFd::Create());
  EXPECT_EQ(event.Drain(), 0u);
  event.Notify();
  event.Notify();
  EXPECT_EQ(event.Drain(), 2u);
  EXPECT_EQ(event.Drain(), 0u);
}

}  // namespace
}  // namespace sp
