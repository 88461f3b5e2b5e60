#include "os/system.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "os/files.h"
#include "os/test_util.h"

namespace sp {
namespace {

// A made-up /proc and /sys.
class FakeRoot {
 public:
  void Put(const std::string& path, const std::string& content) {
    const std::filesystem::path full = directory_.path() + path;
    std::filesystem::create_directories(full.parent_path());
    ASSERT_TRUE(WriteFileAtomic(full.string(), AsBytes(content), 0600).ok());
  }
  uint64_t Available() const { return AvailableMemoryBytes(directory_.path()).value(); }
  const std::string& path() const { return directory_.path(); }

 private:
  TemporaryDirectory directory_;
};

constexpr char kMeminfo[] = "MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\nSwapTotal: 5 kB\n";

TEST(System, BootIdIsStable) {
  SP_ASSERT_OK_AND_ASSIGN(const Id128 id, BootId());
  EXPECT_FALSE(id.is_zero());
  EXPECT_EQ(BootId().value(), id);
}

TEST(System, RandomIdsDiffer) {
  EXPECT_NE(RandomId128(), RandomId128());
  EXPECT_FALSE(RandomId128().is_zero());
}

TEST(AvailableMemory, OfThisMachineIsPlausible) {
  SP_ASSERT_OK_AND_ASSIGN(const uint64_t bytes, AvailableMemoryBytes());
  EXPECT_GT(bytes, 1u << 20);
  EXPECT_LT(bytes, 1ULL << 50);
}

TEST(AvailableMemory, WithoutCgroupsIsMemAvailable) {
  FakeRoot root;
  SP_EXPECT_CODE(kNotFound, AvailableMemoryBytes(root.path()));
  root.Put("/proc/meminfo", kMeminfo);
  EXPECT_EQ(root.Available(), 1000u * 1024);
  root.Put("/proc/self/cgroup", "0::/\n");
  EXPECT_EQ(root.Available(), 1000u * 1024);
}

TEST(AvailableMemory, TheTightestVersion2GroupCounts) {
  FakeRoot root;
  root.Put("/proc/meminfo", kMeminfo);
  root.Put("/proc/self/cgroup", "0::/a/b\n");
  root.Put("/sys/fs/cgroup/a/b/memory.max", "max\n");
  root.Put("/sys/fs/cgroup/a/b/memory.current", "70000\n");
  EXPECT_EQ(root.Available(), 1000u * 1024);
  root.Put("/sys/fs/cgroup/a/memory.max", "100000\n");
  root.Put("/sys/fs/cgroup/a/memory.current", "90000\n");
  EXPECT_EQ(root.Available(), 10'000u);
  root.Put("/sys/fs/cgroup/a/memory.stat", "anon 5\nactive_file 7\ninactive_file 2000\n");
  EXPECT_EQ(root.Available(), 12'000u);
  root.Put("/sys/fs/cgroup/a/memory.current", "200000\n");
  EXPECT_EQ(root.Available(), 0u);
}

TEST(AvailableMemory, Version1AlsoWhenTheHostsPathIsHidden) {
  FakeRoot root;
  root.Put("/proc/meminfo", kMeminfo);
  root.Put("/proc/self/cgroup", "12:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/docker/x\nnonsense\n");
  root.Put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "50000\n");
  root.Put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "20000\n");
  EXPECT_EQ(root.Available(), 30'000u);
}

}  // namespace
}  // namespace sp
