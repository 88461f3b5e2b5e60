// Connecting, reconnecting, deadlines, versions: the transport under every call.
#include <atomic>
#include <future>
#include <thread>

#include "client/client_test_util.h"

namespace sp {
namespace {

using Answer = FakeDaemon::Answer;

TEST_F(ClientTest, NobodyListensIsUnavailableAtOnceAndNamesTheSocket) {
  const Nanos begin = MonotonicNow();
  const auto client = Client::Connect({.socket_path = directory_.File("s")});
  SP_EXPECT_CODE(kUnavailable, client);
  EXPECT_NE(client.error().message().find(directory_.File("s")), std::string::npos);
  EXPECT_LT(MonotonicNow() - begin, 5 * kNanosPerSecond);
}

// F: the worker dies after it took the request. The keeper's socket stays.
TEST_F(ClientTest, LostReplyIsRepeatedOnANewConnectionOfTheSameSession) {
  daemon_.Start();
  auto client = Connect();
  std::atomic<int> calls = 0;
  daemon_.SetHook(MessageType::kStatus, [&](const Frame&) -> std::optional<Answer> {
    if (calls++ == 0) return Answer{.close = true};
    return std::nullopt;
  });
  SP_ASSERT_OK(client->StatusJson());
  EXPECT_EQ(calls, 2);
  const auto hellos = daemon_.Seen(MessageType::kHello);
  ASSERT_EQ(hellos.size(), 2u);
  EXPECT_EQ(hellos[0].body, hellos[1].body);  // Session id and all.
}

TEST_F(ClientTest, IdleConnectionsOfADeadWorkerDoNotFailTheNextCall) {
  daemon_.Start();
  auto client = Connect();
  SP_ASSERT_OK(client->StatusJson());
  daemon_.DropConnections();
  SP_ASSERT_OK(client->StatusJson());
}

TEST_F(ClientTest, WaitsForADaemonThatComesBackWithinTheDeadline) {
  daemon_.Start();
  auto client = Connect();
  daemon_.Stop();
  auto call = std::async(std::launch::async, [&] { return client->StatusJson(); });
  daemon_.Start();
  SP_EXPECT_CODE(kOk, call.get());
}

// At the end of an interpreter there may be a client per namespace, and each waited two seconds for a daemon that was gone.
TEST_F(ClientTest, TheGoodbyeWaitsForNobody) {
  daemon_.Start();
  auto client = Connect();
  daemon_.Stop();
  const Nanos begin = MonotonicNow();
  client->Close();
  EXPECT_LT(MonotonicNow() - begin, kNanosPerSecond);
}

TEST_F(ClientTest, TheGoodbyeReachesTheNextWorker) {
  daemon_.Start();
  auto client = Connect();
  daemon_.DropConnections();
  client->Close();
  EXPECT_EQ(daemon_.SeenCount(MessageType::kBye), 1u);
}

TEST_F(ClientTest, UnreachableUntilTheDeadlineIsUnavailable) {
  daemon_.Start();
  auto client = Connect(200 * kNanosPerMilli);
  daemon_.Stop();
  const Nanos begin = MonotonicNow();
  const auto status = client->StatusJson();
  SP_EXPECT_CODE(kUnavailable, status);
  EXPECT_NE(status.error().message().find(directory_.File("s")), std::string::npos);
  EXPECT_GE(MonotonicNow() - begin, 200 * kNanosPerMilli);
}

TEST_F(ClientTest, SilenceEndsAtTheDeadlineAndTheNextCallIsNotConfused) {
  daemon_.Start();
  auto client = Connect(300 * kNanosPerMilli);
  std::atomic<int> calls = 0;
  daemon_.SetHook(MessageType::kStatus, [&](const Frame&) -> std::optional<Answer> {
    if (calls++ == 0) return Answer{};  // No answer at all.
    return std::nullopt;
  });
  SP_EXPECT_CODE(kDeadline, client->StatusJson());
  SP_EXPECT_CODE(kOk, client->StatusJson());
}

TEST_F(ClientTest, AnotherVersionIsRefusedNamingBoth) {
  daemon_.SetHook(MessageType::kHello, [](const Frame& f) -> std::optional<Answer> {
    Frame frame = Frame::Error(f.type, f.request_id, Status(StatusCode::kProtocol, "this daemon speaks protocol version 9, the client 1 to 1"));
    frame.version = 9;
    return Answer{.frame = frame};
  });
  daemon_.Start();
  const auto client = Client::Connect({.socket_path = directory_.File("s")});
  SP_EXPECT_CODE(kProtocol, client);
  EXPECT_NE(client.error().message().find("version 9"), std::string::npos) << client.error().message();
  EXPECT_NE(client.error().message().find("version 1"), std::string::npos) << client.error().message();
  EXPECT_EQ(daemon_.SeenCount(MessageType::kHello), 1u);
}

TEST_F(ClientTest, GarbageIsAProtocolErrorAndTheConnectionIsGone) {
  daemon_.Start();
  auto client = Connect();
  const std::vector<std::function<Answer(const Frame&)>> bad = {
      [](const Frame&) { return Answer{.garbage = std::vector<uint8_t>(100, 0xab)}; },
      [](const Frame& f) { return Answer{.frame = MakeFrame(MessageType::kLatest, f.request_id, Empty{})}; },
      [](const Frame& f) { return Answer{.frame = MakeFrame(f.type, f.request_id + 1, StatusReply{"{}"})}; },
      [](const Frame& f) { return Answer{.frame = MakeFrame(f.type, f.request_id, SealReply{})}; },
  };
  for (size_t i = 0; i < bad.size(); ++i) {
    std::atomic<int> calls = 0;
    daemon_.SetHook(MessageType::kStatus, [&](const Frame& f) -> std::optional<Answer> {
      if (calls++ == 0) return bad[i](f);
      return std::nullopt;
    });
    EXPECT_EQ(client->StatusJson().error().code(), StatusCode::kProtocol) << i;
    SP_EXPECT_CODE(kOk, client->StatusJson());
  }
}

TEST_F(ClientTest, UnaskedDescriptorsAreRefusedAndClosed) {
  daemon_.Start();
  auto client = Connect();
  daemon_.SetHook(MessageType::kStatus, [&](const Frame& f) -> std::optional<Answer> {
    return Answer{.frame = MakeFrame(f.type, f.request_id, StatusReply{"{}"}), .fds = {0, 1}};
  });
  SP_EXPECT_CODE(kProtocol, client->StatusJson());
  client.reset();
  daemon_.Stop();
  const int before = CountOpenFds();
  daemon_.Start();
  client = Connect();
  SP_EXPECT_CODE(kProtocol, client->StatusJson());
  client.reset();
  daemon_.Stop();
  EXPECT_EQ(CountOpenFds(), before);
}

TEST_F(ClientTest, TheDaemonsErrorArrivesWithItsText) {
  daemon_.Start();
  auto client = Connect();
  const auto latest = client->Latest("job");
  SP_EXPECT_CODE(kNotFound, latest);
  EXPECT_EQ(latest.error().message(), "never had a complete step");
  SP_EXPECT_CODE(kInvalidArgument, client->Latest("not a name"));
}

// A call that waits must not hold up another one, and Close ends it.
TEST_F(ClientTest, AWaitHoldsUpNobodyAndEndsWithClose) {
  daemon_.Start();
  auto client = Connect();
  daemon_.SetHook(MessageType::kWait, [](const Frame&) { return Answer{}; });
  std::vector<std::future<Result<Level>>> waits;
  for (int i = 0; i < 10; ++i) {  // More than there are connections.
    waits.push_back(std::async(std::launch::async, [&] { return client->Wait("job", Id128{{1}}, Level::kMemory, kForever); }));
  }
  daemon_.AwaitSeen(MessageType::kWait, kLongCallsMax);
  SP_EXPECT_CODE(kOk, client->StatusJson());
  EXPECT_EQ(daemon_.SeenCount(MessageType::kWait), kLongCallsMax);
  client->Close();
  for (auto& wait : waits) SP_EXPECT_CODE(kClosed, wait.get());
  SP_EXPECT_CODE(kClosed, client->StatusJson());
  EXPECT_EQ(daemon_.SeenCount(MessageType::kBye), 1u);
}

TEST_F(ClientTest, WaitAnswersAndTimesOut) {
  daemon_.Start();
  auto client = Connect();
  EXPECT_EQ(client->Wait("job", Id128{{1}}, Level::kMemory, kForever), Level::kMemory);
  daemon_.SetHook(MessageType::kWait, [](const Frame&) { return Answer{}; });
  SP_EXPECT_CODE(kDeadline, client->Wait("job", Id128{{1}}, Level::kMemory, 10 * kNanosPerMilli));
}

TEST_F(ClientTest, ConnectionsAreBoundedUnderManyThreads) {
  daemon_.Start();
  auto client = Connect();
  std::vector<std::thread> threads;
  std::atomic<int> failed = 0;
  for (int i = 0; i < 24; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 20; ++k) failed += client->StatusJson().has_value() ? 0 : 1;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_LE(daemon_.SeenCount(MessageType::kHello), kConnectionsMax);
}

TEST_F(ClientTest, ListsComeInPages) {
  daemon_.Start();
  auto client = Connect();
  SP_ASSERT_OK_AND_ASSIGN(const auto steps, client->ListSteps("job"));
  ASSERT_EQ(steps.size(), 3u);
  EXPECT_EQ(steps[2].step, 2u);
  EXPECT_EQ(daemon_.SeenCount(MessageType::kListSteps), 2u);
}

}  // namespace
}  // namespace sp
