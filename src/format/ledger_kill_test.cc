// A SIGKILL between any two instructions of the ledger's code leaves the old log or the new one (I-25).
//
// A child process does one operation on shared memory while this test runs it one instruction at a time, and reads the memory back as a
// restarted worker would, each time it has changed. The child is never let past the point where a kill would have stopped it.
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>

#include "format/ledger.h"
#include "format/test_values.h"

namespace sp {
namespace {

constexpr size_t kBytes = Ledger::kHeaderBytes + 2 * Ledger::kAreaBytesMin;

class LedgerKill : public ::testing::Test {
 protected:
  void SetUp() override {
    memory_ = static_cast<uint8_t*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(memory_, MAP_FAILED);
  }
  void TearDown() override { munmap(memory_, kBytes); }

  Ledger Open() { return Ledger::Open({memory_, kBytes}).value(); }

  // Steps through `operation` in a child. `check` gets what a restart would read, once per distinct state of the memory; returns how many.
  int StepThrough(const std::function<void()>& operation, const std::function<void(const Ledger::Contents&)>& check) {
    const pid_t child = fork();
    if (child == 0) {
      if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(2);
      raise(SIGSTOP);
      operation();
      _exit(0);
    }
    int states = 0;
    int status = 0;
    std::vector<uint8_t> seen(memory_, memory_ + kBytes);
    while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
      if (std::memcmp(seen.data(), memory_, kBytes) != 0) {
        ++states;
        seen.assign(memory_, memory_ + kBytes);
        std::vector<uint64_t> copy(kBytes / 8);
        std::memcpy(copy.data(), seen.data(), kBytes);
        auto log = Ledger::Open({reinterpret_cast<uint8_t*>(copy.data()), kBytes});
        EXPECT_TRUE(log.has_value()) << "state " << states << ": " << log.error().ToString();
        if (log) check(log->Read());
      }
      if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) break;
    }
    traced_ = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (!WIFEXITED(status) && !WIFSIGNALED(status)) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
    }
    return states;
  }

  bool traced_ = false;
  uint8_t* memory_ = nullptr;
};

#define SKIP_IF_NOT_TRACED() \
  if (!traced_) GTEST_SKIP() << "this machine does not let a test single-step its own child"

std::vector<LedgerEntry> SomeEntries(uint64_t seed) {
  testing::Randomizer random(seed);
  ledger::Tombstone tombstone = testing::RandomValue<ledger::Tombstone>(random);
  return {tombstone, ledger::SlotGone{random.Next()}, ledger::Quarantine{testing::Counting<32>(static_cast<uint8_t>(seed)), seed}};
}

TEST_F(LedgerKill, Format) {
  const int states = StepThrough([&] { (void)Ledger::Open({memory_, kBytes}); },
                                 [](const Ledger::Contents& c) { EXPECT_TRUE(c.entries.empty() && c.damaged_entries == 0); });
  SKIP_IF_NOT_TRACED();
  EXPECT_EQ(states, 5) << "one per store of the header";
}

TEST_F(LedgerKill, Append) {
  const std::vector<LedgerEntry> old = SomeEntries(1);
  Ledger log = Open();
  for (const LedgerEntry& e : old) ASSERT_TRUE(log.Append(e).ok());
  std::vector<LedgerEntry> with_new = old;
  with_new.push_back(SomeEntries(2)[0]);
  bool published = false;
  const int states = StepThrough([&] { (void)log.Append(with_new.back()); },
                                 [&](const Ledger::Contents& c) {
                                   EXPECT_EQ(c.damaged_entries, 0u);
                                   EXPECT_FALSE(published) << "the commit word is the last store";
                                   published = c.entries == with_new;
                                   EXPECT_TRUE(published || c.entries == old);
                                 });
  SKIP_IF_NOT_TRACED();
  EXPECT_TRUE(published);
  EXPECT_GE(states, 2);
}

TEST_F(LedgerKill, Compact) {
  const std::vector<LedgerEntry> first = SomeEntries(3);
  Ledger log = Open();
  for (const LedgerEntry& e : first) ASSERT_TRUE(log.Append(e).ok());
  std::vector<LedgerEntry> old = first;
  for (uint64_t seed : {4, 5}) {  // Into the second area, and back into the first one, over the remains of the old log.
    const std::vector<LedgerEntry> snapshot = SomeEntries(seed);
    bool published = false;
    const int states = StepThrough([&] { (void)log.Compact(snapshot); },
                                   [&](const Ledger::Contents& c) {
                                     EXPECT_EQ(c.damaged_entries, 0u);
                                     EXPECT_FALSE(published) << "the commit word is the last store";
                                     published = c.entries == snapshot;
                                     EXPECT_TRUE(published || c.entries == old);
                                   });
    SKIP_IF_NOT_TRACED();
    EXPECT_TRUE(published);
    EXPECT_GE(states, static_cast<int>(snapshot.size()) + 1);
    old = snapshot;
    log = Open();
  }
}

}  // namespace
}  // namespace sp
