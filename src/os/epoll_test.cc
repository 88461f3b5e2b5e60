// The pieces of an event loop: epoll and signals.
#include "os/epoll.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <thread>

#include "os/signals.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr uint64_t kToken = 0xfedcba9876543210;

TEST(Epoll, ReportsTokensUntilRemoved) {
  SP_ASSERT_OK_AND_ASSIGN(Epoll epoll, Epoll::Create());
  SP_ASSERT_OK_AND_ASSIGN(const EventFd event, EventFd::Create());
  SP_ASSERT_OK(epoll.Add(event.fd(), EPOLLIN, kToken));
  EXPECT_EQ(epoll.Wait(0)->size(), 0u);
  std::thread other([&] { event.Notify(); });
  SP_ASSERT_OK_AND_ASSIGN(const auto events, epoll.Wait(-1));
  other.join();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].token, kToken);
  EXPECT_EQ(events[0].events, static_cast<uint32_t>(EPOLLIN));
  SP_ASSERT_OK(epoll.Modify(event.fd(), 0, kToken));
  EXPECT_EQ(epoll.Wait(0)->size(), 0u);
  SP_ASSERT_OK(epoll.Modify(event.fd(), EPOLLIN | EPOLLOUT, 7));
  EXPECT_EQ(epoll.Wait(0)->front().token, 7u);
  SP_ASSERT_OK(epoll.Remove(event.fd()));
  EXPECT_EQ(epoll.Wait(0)->size(), 0u);
  SP_EXPECT_CODE(kNotFound, epoll.Remove(event.fd()));
}

TEST(SignalFd, DeliversBlockedSignalsAsEvents) {
  const int wanted[] = {SIGUSR1, SIGUSR2};
  SP_ASSERT_OK_AND_ASSIGN(const SignalFd signals, SignalFd::Create(wanted));
  EXPECT_FALSE(signals.Read()->has_value());
  ASSERT_EQ(::kill(::getpid(), SIGUSR2), 0);  // Unblocked it would end this test.
  SP_ASSERT_OK_AND_ASSIGN(const auto received, signals.Read());
  ASSERT_TRUE(received.has_value());
  EXPECT_EQ(received->number, SIGUSR2);
  EXPECT_EQ(received->sender, ::getpid());
  EXPECT_FALSE(signals.Read()->has_value());
}

}  // namespace
}  // namespace sp
