#include "os/unix_socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "os/peer_identity.h"
#include "os/pidfd.h"
#include "os/test_util.h"

namespace sp {
namespace {

Nanos Soon() { return MonotonicNow() + 20 * kNanosPerMilli; }
Nanos Later() { return MonotonicNow() + 30 * kNanosPerSecond; }

struct Ends {
  Fd a, b;
  Ends() {
    auto pair = UnixSocketPair().value();
    a = std::move(pair.first);
    b = std::move(pair.second);
  }
};

TEST(UnixSocket, CarriesWholeMessagesAndWorkingDescriptors) {
  Ends ends;
  SP_ASSERT_OK_AND_ASSIGN(Pipe pipe, Pipe::Create());
  const int fds[] = {pipe.read_end.get(), pipe.write_end.get()};
  SP_ASSERT_OK(SendMessage(ends.a.get(), AsBytes("one"), fds));
  SP_ASSERT_OK(SendMessage(ends.a.get(), AsBytes("second")));
  std::array<uint8_t, 64> buffer;
  SP_ASSERT_OK_AND_ASSIGN(const ReceivedMessage first, ReceiveMessage(ends.b.get(), buffer, 2));
  EXPECT_EQ(AsText(ByteSpan(buffer).first(first.size_bytes)), "one");
  ASSERT_EQ(first.fds.size(), 2u);
  for (const Fd& fd : first.fds) EXPECT_EQ(::fcntl(fd.get(), F_GETFD), FD_CLOEXEC);
  ASSERT_EQ(::write(first.fds[1].get(), "x", 1), 1);
  char byte = 0;
  ASSERT_EQ(::read(pipe.read_end.get(), &byte, 1), 1);
  EXPECT_EQ(byte, 'x');
  SP_ASSERT_OK_AND_ASSIGN(const ReceivedMessage second, ReceiveMessage(ends.b.get(), buffer, 0));
  EXPECT_EQ(AsText(ByteSpan(buffer).first(second.size_bytes)), "second");
  SP_EXPECT_CODE(kUnavailable, ReceiveMessage(ends.b.get(), buffer, 0));
}

TEST(UnixSocket, Carries128DescriptorsAndRefusesToSendMore) {
  Ends ends;
  const int before = CountOpenFds();
  const std::vector<int> fds(129, ends.a.get());
  SP_EXPECT_CODE(kInvalidArgument, SendMessage(ends.a.get(), AsBytes("m"), fds));
  SP_ASSERT_OK(SendMessage(ends.a.get(), AsBytes("m"), std::span(fds).first(128)));
  std::array<uint8_t, 8> buffer;
  {
    SP_ASSERT_OK_AND_ASSIGN(const ReceivedMessage got, ReceiveMessage(ends.b.get(), buffer, 128));
    EXPECT_EQ(got.fds.size(), 128u);
    EXPECT_EQ(CountOpenFds(), before + 128);
  }
  EXPECT_EQ(CountOpenFds(), before);
}

// T-8: whatever comes with a refused message is closed again.
TEST(UnixSocket, KnowsWhatItsPeerHasNotReceived) {
  SP_ASSERT_OK_AND_ASSIGN(auto ends, UnixSocketPair());
  EXPECT_EQ(UnreadByPeer(ends.first.get()).value(), 0u);
  std::array<uint8_t, 16> data{1};
  ASSERT_TRUE(SendMessage(ends.first.get(), data).ok());
  EXPECT_GT(UnreadByPeer(ends.first.get()).value(), 0u);
  ASSERT_TRUE(ReceiveMessage(ends.second.get(), data, 0).has_value());
  EXPECT_EQ(UnreadByPeer(ends.first.get()).value(), 0u);
}

TEST(UnixSocket, RefusedMessagesLeakNoDescriptor) {
  Ends ends;
  const int before = CountOpenFds();
  std::array<uint8_t, 8> buffer;
  for (int sent = 1; sent <= 9; ++sent) {
    for (int allowed = 0; allowed < sent; ++allowed) {
      const std::vector<int> fds(sent, ends.a.get());
      SP_ASSERT_OK(SendMessage(ends.a.get(), AsBytes("m"), fds));
      SP_EXPECT_CODE(kProtocol, ReceiveMessage(ends.b.get(), buffer, allowed));
      ASSERT_EQ(CountOpenFds(), before) << sent << " sent, " << allowed << " allowed";
    }
  }
  // Too long, with descriptors.
  const int one[] = {ends.a.get()};
  SP_ASSERT_OK(SendMessage(ends.a.get(), AsBytes("more than eight bytes"), one));
  SP_EXPECT_CODE(kProtocol, ReceiveMessage(ends.b.get(), buffer, 4));
  EXPECT_EQ(CountOpenFds(), before);
  // Empty, with descriptors: SendMessage refuses to, so the peer here is a hostile one.
  char control[CMSG_SPACE(sizeof(int))] = {};
  iovec nothing{.iov_base = buffer.data(), .iov_len = 0};
  msghdr message{};
  message.msg_iov = &nothing;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), one, sizeof one);
  ASSERT_EQ(::sendmsg(ends.a.get(), &message, 0), 0);
  SP_EXPECT_CODE(kClosed, ReceiveMessage(ends.b.get(), buffer, 4));
  EXPECT_EQ(CountOpenFds(), before);
}

TEST(UnixSocket, DescriptorsBeyondOurLimitAreAnErrorAndNoLeak) {
  Ends ends;
  const int before = CountOpenFds();
  const std::vector<int> fds(8, ends.a.get());
  SP_ASSERT_OK(SendMessage(ends.a.get(), AsBytes("m"), fds));
  rlimit old_limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &old_limit), 0);
  // The lowest free number plus three: room for three of the eight.
  const int next_free = ::dup(0);
  ::close(next_free);
  rlimit tight = old_limit;
  tight.rlim_cur = static_cast<rlim_t>(next_free) + 3;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &tight), 0);
  std::array<uint8_t, 8> buffer;
  const Result<ReceivedMessage> got = ReceiveMessage(ends.b.get(), buffer, 8);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &old_limit), 0);
  SP_EXPECT_CODE(kProtocol, got);
  EXPECT_EQ(CountOpenFds(), before);
}

TEST(UnixSocket, ClosedPeerIsAnErrorNotASignal) {
  Ends ends;
  ends.a.Reset();
  std::array<uint8_t, 8> buffer;
  SP_EXPECT_CODE(kClosed, ReceiveMessage(ends.b.get(), buffer, 0));
  SP_EXPECT_CODE(kClosed, SendMessage(ends.b.get(), AsBytes("m")));
  SP_ASSERT_OK_AND_ASSIGN(const bool readable, WaitReadable(ends.b.get(), 0));
  EXPECT_TRUE(readable);
}

TEST(UnixSocket, FullQueueIsUnavailableThenDeadline) {
  Ends ends;
  const std::vector<uint8_t> block(4096);
  Status sent;
  while (sent.ok()) sent = SendMessage(ends.a.get(), block);
  SP_EXPECT_CODE(kUnavailable, sent);
  SP_EXPECT_CODE(kDeadline, SendMessageBy(ends.a.get(), block, {}, Soon()));
  std::array<uint8_t, 4096> buffer;
  std::thread reader([&] {
    while (ReceiveMessageBy(ends.b.get(), buffer, 0, Later())) {
    }
  });
  SP_ASSERT_OK(SendMessageBy(ends.a.get(), block, {}, Later()));
  ends.a.Reset();
  reader.join();
}

TEST(UnixSocket, ReceiveWaitsUntilItsDeadline) {
  Ends ends;
  std::array<uint8_t, 8> buffer;
  const Nanos before = MonotonicNow();
  SP_EXPECT_CODE(kDeadline, ReceiveMessageBy(ends.b.get(), buffer, 0, before + 20 * kNanosPerMilli));
  EXPECT_GE(MonotonicNow() - before, 20 * kNanosPerMilli);
  std::thread sender([&] { EXPECT_TRUE(SendMessage(ends.a.get(), AsBytes("m")).ok()); });
  EXPECT_TRUE(ReceiveMessageBy(ends.b.get(), buffer, 0, Later()).has_value());
  sender.join();
}

extern "C" void IgnoreSignal(int) {}

TEST(UnixSocket, InterruptedWaitGoesOn) {
  Ends ends;
  struct sigaction action {};
  action.sa_handler = IgnoreSignal;  // Without SA_RESTART, so that system calls see EINTR.
  struct sigaction before {};
  ASSERT_EQ(::sigaction(SIGUSR1, &action, &before), 0);
  const pthread_t self = ::pthread_self();
  std::atomic<bool> done = false;
  std::thread pest([&] {
    for (int i = 0; i < 200 && !done; ++i) ::pthread_kill(self, SIGUSR1), std::this_thread::yield();
    EXPECT_TRUE(SendMessage(ends.a.get(), AsBytes("m")).ok());
  });
  std::array<uint8_t, 8> buffer;
  EXPECT_TRUE(ReceiveMessageBy(ends.b.get(), buffer, 0, Later()).has_value());
  done = true;
  pest.join();
  ::sigaction(SIGUSR1, &before, nullptr);
}

TEST(ListenUnix, ServesWithItsModeAndReplacesAStaleSocket) {
  TemporaryDirectory directory;
  const std::string path = directory.File("s");
  for (int round = 0; round < 2; ++round) {  // The second finds the file of the first, which nobody serves.
    SP_ASSERT_OK_AND_ASSIGN(const Fd listener, ListenUnix(path, 0640));
    struct stat info {};
    ASSERT_EQ(::stat(path.c_str(), &info), 0);
    EXPECT_TRUE(S_ISSOCK(info.st_mode));
    EXPECT_EQ(info.st_mode & 0777, 0640u);
    SP_EXPECT_CODE(kUnavailable, AcceptUnix(listener.get()));
    SP_ASSERT_OK_AND_ASSIGN(const Fd client, ConnectUnix(path, Later()));
    SP_ASSERT_OK_AND_ASSIGN(const Fd server, AcceptUnix(listener.get()));
    SP_ASSERT_OK(SendMessage(client.get(), AsBytes("hi")));
    std::array<uint8_t, 8> buffer;
    SP_ASSERT_OK(ReceiveMessage(server.get(), buffer, 0));
    SP_EXPECT_CODE(kUnavailable, ListenUnix(path, 0600));
  }
  SP_EXPECT_CODE(kUnavailable, ConnectUnix(path, Later()));
  SP_EXPECT_CODE(kNotFound, ConnectUnix(directory.File("none"), Later()));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1);
}

TEST(ListenUnix, RefusesLongPathsAndOtherPeoplesFiles) {
  TemporaryDirectory directory;
  const Result<Fd> too_long = ListenUnix(directory.File(std::string(100, 'x')), 0600);
  SP_EXPECT_CODE(kInvalidArgument, too_long);
  EXPECT_NE(too_long.error().message().find("allowed are 100"), std::string::npos) << too_long.error().message();
  SP_EXPECT_CODE(kInvalidArgument, ConnectUnix(std::string(108, 'x'), Later()));
  const std::string longest = directory.File(std::string(kMaxSocketPathBytes - directory.path().size() - 1, 'x'));
  SP_ASSERT_OK_AND_ASSIGN(const Fd listener, ListenUnix(longest, 0600));
  SP_ASSERT_OK(ConnectUnix(longest, Later()));

  Fd file(::open(directory.File("plain").c_str(), O_CREAT | O_CLOEXEC, 0600));
  SP_EXPECT_CODE(kInvalidArgument, ListenUnix(directory.File("plain"), 0600));
  EXPECT_TRUE(std::filesystem::exists(directory.File("plain")));
}

TEST(ConnectUnix, WaitsForAPlaceInTheQueueUntilItsDeadline) {
  TemporaryDirectory directory;
  const std::string path = directory.File("s");
  SP_ASSERT_OK_AND_ASSIGN(const Fd listener, ListenUnix(path, 0600, /*backlog=*/0));
  SP_ASSERT_OK_AND_ASSIGN(const Fd queued, ConnectUnix(path, Later()));
  const Nanos before = MonotonicNow();
  SP_EXPECT_CODE(kDeadline, ConnectUnix(path, before + 30 * kNanosPerMilli));
  EXPECT_GE(MonotonicNow() - before, 30 * kNanosPerMilli);
  SP_EXPECT_CODE(kUnavailable, ListenUnix(path, 0600));  // A full queue is not a stale socket.
  std::thread acceptor([&] {
    Fd first = AcceptUnix(listener.get()).value();
    EXPECT_TRUE(WaitReadable(listener.get(), 30 * kNanosPerSecond).value());
    EXPECT_TRUE(AcceptUnix(listener.get()).has_value());
  });
  SP_ASSERT_OK(ConnectUnix(path, Later()));
  acceptor.join();
}

TEST(PeerIdentity, IsTheKernelsViewAndItsPidfdSeesTheEnd) {
  TemporaryDirectory directory;
  const std::string path = directory.File("s");
  SP_ASSERT_OK_AND_ASSIGN(const Fd listener, ListenUnix(path, 0600));
  SP_ASSERT_OK_AND_ASSIGN(Pipe hold, Pipe::Create());
  const pid_t child = ::fork();
  if (child == 0) {
    hold.write_end.Reset();
    const Result<Fd> connection = ConnectUnix(path, Later());
    char byte;
    ::_exit(connection && ::read(hold.read_end.get(), &byte, 1) == 0 ? 0 : 1);
  }
  hold.read_end.Reset();
  ASSERT_TRUE(WaitReadable(listener.get(), 30 * kNanosPerSecond).value());
  SP_ASSERT_OK_AND_ASSIGN(const Fd server, AcceptUnix(listener.get()));
  SP_ASSERT_OK_AND_ASSIGN(const PeerIdentity peer, GetPeerIdentity(server.get()));
  EXPECT_EQ(peer.pid, child);
  EXPECT_EQ(peer.uid, ::geteuid());
  EXPECT_EQ(peer.gid, ::getegid());
  EXPECT_EQ(peer.start_time, ProcessStartTime(child));
  EXPECT_NE(peer.start_time, 0u);
  ASSERT_NE(peer.pidfd_source, PidfdSource::kNone);
  EXPECT_EQ(::fcntl(peer.pidfd.get(), F_GETFD), FD_CLOEXEC);
  EXPECT_TRUE(IsAlive(peer.pidfd));
  hold.write_end.Reset();
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_FALSE(IsAlive(peer.pidfd));
  // Asked again after the death: whatever the kernel gives, it is not a living process.
  SP_ASSERT_OK_AND_ASSIGN(const PeerIdentity late, GetPeerIdentity(server.get()));
  EXPECT_FALSE(late.pidfd.valid() && IsAlive(late.pidfd));
  EXPECT_EQ(late.start_time, 0u);
}

}  // namespace
}  // namespace sp
