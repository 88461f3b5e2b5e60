#include "os/pidfd.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "os/test_util.h"

namespace sp {
namespace {

// A child with an awkward name, which it has already, that lives until `hold.write_end` closes.
pid_t ForkHeldChild(Pipe& hold, const char* name) {
  Pipe named = Pipe::Create().value();
  const pid_t child = ::fork();
  char byte = 0;
  if (child == 0) {
    hold.write_end.Reset();
    const bool told = ::prctl(PR_SET_NAME, name) == 0 && ::write(named.write_end.get(), &byte, 1) == 1;
    ::_exit(told && ::read(hold.read_end.get(), &byte, 1) == 0 ? 0 : 1);
  }
  named.write_end.Reset();
  EXPECT_EQ(::read(named.read_end.get(), &byte, 1), 1);
  return child;
}

TEST(Pidfd, SeesTheEndBeforeAndAfterReaping) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe hold, Pipe::Create());
  const pid_t child = ForkHeldChild(hold, "held");
  SP_ASSERT_OK_AND_ASSIGN(const Fd pidfd, OpenPidfd(child));
  const uint64_t start = ProcessStartTime(child);
  EXPECT_TRUE(IsAlive(pidfd));
  EXPECT_EQ(StillSameProcess(child, start), SameProcess::kYes);
  hold.write_end.Reset();
  siginfo_t info{};
  ASSERT_EQ(::waitid(P_PID, child, &info, WEXITED | WNOWAIT), 0);
  EXPECT_FALSE(IsAlive(pidfd));
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_FALSE(IsAlive(pidfd));
  EXPECT_EQ(StillSameProcess(child, start), SameProcess::kNo);
  EXPECT_EQ(ProcessStartTime(child), 0u);
  SP_EXPECT_CODE(kNotFound, OpenPidfd(child));
}

TEST(ProcessStartTime, SurvivesNamesWithSpacesAndParentheses) {
  for (const char* name : {"plain", "a b", "x) R 1 (y", ") 9 9 9"}) {
    SP_ASSERT_OK_AND_ASSIGN(Pipe hold, Pipe::Create());
    const uint64_t mine = ProcessStartTime(::getpid());
    ASSERT_GT(mine, 0u);
    const pid_t child = ForkHeldChild(hold, name);
    // The child was started after us, within the run time of this test.
    const uint64_t start = ProcessStartTime(child);
    EXPECT_GE(start, mine) << name;
    EXPECT_LE(start, mine + 600 * static_cast<uint64_t>(::sysconf(_SC_CLK_TCK))) << name;
    hold.write_end.Reset();
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  }
}

TEST(StillSameProcess, TellsReuseFromIgnorance) {
  const uint64_t mine = ProcessStartTime(::getpid());
  EXPECT_EQ(StillSameProcess(::getpid(), mine), SameProcess::kYes);
  EXPECT_EQ(StillSameProcess(::getpid(), mine + 1), SameProcess::kNo);
  EXPECT_EQ(StillSameProcess(::getpid(), 0), SameProcess::kUnknown);
  EXPECT_EQ(StillSameProcess(0, mine), SameProcess::kUnknown);
}

}  // namespace
}  // namespace sp
