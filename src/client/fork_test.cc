// A forked child of a trainer (a data loader) inherits our objects but not their threads: using them fails, destroying them is harmless.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "client/client_test_util.h"

namespace sp {
namespace {

// Exit code of a child that runs `body`; -1 if it hangs for 20 s or dies otherwise.
int InChild(const std::function<int()>& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::alarm(20);
    ::_exit(body());
  }
  int status = 0;
  EXPECT_EQ(::waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(ClientTest, AChildCanUseNothingAndItsDestructorsHarmNobody) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(100'000);
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(100'000), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(auto done, client->Reserve(Shard(100'000, 2), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer sealed, done->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(sealed.WaitSealed(kForever));
  SP_ASSERT_OK_AND_ASSIGN(auto pin, client->OpenRead({.ns = "job"}));
  auto reader = pin->Shard(0);
  ASSERT_TRUE(reader.has_value());
  const size_t unpins = daemon_.SeenCount(MessageType::kUnpin);

  const int code = InChild([&] {
    const auto unavailable = [](const Status& s) {
      return s.code() == StatusCode::kUnavailable && s.message().find("forked child") != std::string::npos;
    };
    if (!unavailable(test::StatusOf(client->StatusJson()))) return 1;
    if (!unavailable(test::StatusOf(client->Reserve(Shard(10'000, 3), kDefaultTimeout)))) return 2;
    if (!unavailable(test::StatusOf(lease->Start(shard.header(), shard.segments(), shard.seal)))) return 3;
    if (!unavailable(lease->Abort("child"))) return 4;
    if (!unavailable(sealed.WaitCopied(0)) || !unavailable(test::StatusOf(sealed.WaitSealed(0)))) return 5;
    if ((*reader)->Header().has_value() || !unavailable((*reader)->Header().error().status)) return 6;
    if (pin->Shard(0).has_value() || !unavailable(pin->Shard(0).error().status)) return 7;
    // The slot's addresses are free here. Something of the child's own may lie there, and must stay.
    void* const at = lease->data();
    if (::mmap(at, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at) return 8;
    *static_cast<int*>(at) = 42;
    client->Close();
    pin->Close();
    reader->reset();
    pin.reset();
    lease.reset();
    done.reset();
    client.reset();
    return *static_cast<int*>(at) == 42 ? 0 : 9;
  });
  EXPECT_EQ(code, 0);

  // The parent saw nothing of it.
  EXPECT_EQ(daemon_.SeenCount(MessageType::kBye), 0u);
  EXPECT_EQ(daemon_.SeenCount(MessageType::kUnpin), unpins);
  EXPECT_EQ(daemon_.SeenCount(MessageType::kAbort), 0u);
  SP_ASSERT_OK(client->StatusJson());
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(transfer.WaitSealed(kForever));
}

TEST_F(ClientTest, AForkWhileALockIsHeldDoesNotHangTheChild) {
  daemon_.Start();
  auto client = Connect();
  std::atomic<bool> stop = false;
  std::thread busy([&] {
    while (!stop) EXPECT_TRUE(client->StatusJson().has_value());
  });
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(InChild([&] {
                const bool refused = !client->StatusJson().has_value();
                client.reset();
                return refused ? 0 : 1;
              }),
              0);
  }
  stop = true;
  busy.join();
}

}  // namespace
}  // namespace sp
