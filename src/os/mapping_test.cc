#include "os/mapping.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "os/memfd.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr uint64_t kExtent = 64 * 1024;

// The protection column of the mapping of `at` in /proc/self/maps; empty when nothing is mapped there.
std::string ProtectionAt(const void* at) {
  FILE* maps = ::fopen("/proc/self/maps", "re");
  std::string found;
  char line[1024];
  while (::fgets(line, sizeof line, maps) != nullptr) {
    unsigned long begin, end;
    char protection[8];
    if (::sscanf(line, "%lx-%lx %7s", &begin, &end, protection) != 3) continue;
    const auto address = reinterpret_cast<unsigned long>(at);
    if (begin <= address && address < end) found = protection;
  }
  ::fclose(maps);
  return found;
}

std::vector<Fd> MakeExtents(int count) {
  std::vector<Fd> extents;
  for (int i = 0; i < count; ++i) extents.push_back(CreateMemfd("extent", kExtent).value());
  return extents;
}

std::vector<int> Numbers(const std::vector<Fd>& fds) {
  std::vector<int> numbers;
  for (const Fd& fd : fds) numbers.push_back(fd.get());
  return numbers;
}

TEST(Mapping, SharesBytesUnmapsAndOutlivesItsDescriptor) {
  SP_ASSERT_OK_AND_ASSIGN(Fd fd, CreateMemfd("test", kExtent));
  const void* at = nullptr;
  {
    SP_ASSERT_OK_AND_ASSIGN(Mapping writer, Mapping::MapShared(fd.get(), kExtent, MapMode::kReadWrite, true));
    SP_ASSERT_OK_AND_ASSIGN(const Mapping reader, Mapping::MapShared(fd.get(), kExtent, MapMode::kReadOnly, false));
    fd.Reset();
    writer.mutable_bytes()[17] = 42;
    EXPECT_EQ(reader.bytes()[17], 42);
    const Mapping moved = std::move(writer);
    EXPECT_FALSE(writer.valid());
    EXPECT_EQ(moved.bytes()[17], 42);
    at = moved.data();
    EXPECT_EQ(ProtectionAt(at), "rw-s");
    EXPECT_EQ(ProtectionAt(reader.data()), "r--s");
  }
  EXPECT_EQ(ProtectionAt(at), "");
}

TEST(Mapping, WritableViewOfReadOnlyMappingIsOurBug) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kExtent));
  SP_ASSERT_OK_AND_ASSIGN(const Mapping reader, Mapping::MapShared(fd.get(), kExtent, MapMode::kReadOnly, false));
  EXPECT_DEATH((void)reader.mutable_bytes(), "CHECK failed");
}

TEST(Mapping, LockSucceedsOrSaysWhy) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kExtent));
  SP_ASSERT_OK_AND_ASSIGN(const Mapping mapping, Mapping::MapShared(fd.get(), kExtent, MapMode::kReadOnly, true));
  const Status locked = mapping.Lock();
  if (!locked.ok()) {
    EXPECT_NE(locked.message().find("RLIMIT_MEMLOCK"), std::string::npos) << locked.message();
  }
}

TEST(SlotMapping, PutsExtentsSideBySideInOrder) {
  const std::vector<Fd> extents = MakeExtents(5);
  std::vector<int> order = Numbers(extents);
  std::swap(order[1], order[3]);
  SP_ASSERT_OK_AND_ASSIGN(SlotMapping slot, SlotMapping::Map(order, kExtent, MapMode::kReadWrite));
  ASSERT_EQ(slot.size_bytes(), 5 * kExtent);
  for (size_t i = 0; i < slot.size_bytes(); ++i) slot.mutable_bytes()[i] = static_cast<uint8_t>(i / kExtent + i % 13);
  for (size_t i = 0; i < order.size(); ++i) {
    std::vector<uint8_t> content(kExtent);
    SP_ASSERT_OK(PReadExact(order[i], content, 0));
    EXPECT_EQ(content, std::vector<uint8_t>(slot.data() + i * kExtent, slot.data() + (i + 1) * kExtent)) << i;
  }
  EXPECT_EQ(ProtectionAt(slot.data() + 4 * kExtent), "rw-s");
}

TEST(SlotMapping, IsUnmappedWholeAlsoWhenItFailsHalfWay) {
  std::vector<Fd> extents = MakeExtents(3);
  SP_ASSERT_OK_AND_ASSIGN(Fd read_only, ReopenReadOnly(extents[2].get()));
  extents[2] = std::move(read_only);
  const auto count_extents = [] {
    int lines = 0;
    FILE* maps = ::fopen("/proc/self/maps", "re");
    char line[1024];
    while (::fgets(line, sizeof line, maps) != nullptr) lines += std::strstr(line, "memfd:extent") != nullptr;
    ::fclose(maps);
    return lines;
  };
  SP_EXPECT_CODE(kDenied, SlotMapping::Map(Numbers(extents), kExtent, MapMode::kReadWrite));
  EXPECT_EQ(count_extents(), 0);
  {
    SP_ASSERT_OK_AND_ASSIGN(const SlotMapping slot, SlotMapping::Map(Numbers(extents), kExtent, MapMode::kReadOnly));
    EXPECT_EQ(count_extents(), 3);
  }
  EXPECT_EQ(count_extents(), 0);
}

TEST(SlotMapping, ForkedChildDoesNotInheritIt) {
  const std::vector<Fd> extents = MakeExtents(2);
  SP_ASSERT_OK_AND_ASSIGN(const SlotMapping slot, SlotMapping::Map(Numbers(extents), kExtent, MapMode::kReadWrite));
  const pid_t child = ::fork();
  if (child == 0) ::_exit(ProtectionAt(slot.data()).empty() ? 0 : 1);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(SlotMapping, RefusesNonsense) {
  const std::vector<Fd> extents = MakeExtents(1);
  SP_EXPECT_CODE(kInvalidArgument, SlotMapping::Map({}, kExtent, MapMode::kReadOnly));
  SP_EXPECT_CODE(kInvalidArgument, SlotMapping::Map(Numbers(extents), 0, MapMode::kReadOnly));
  SP_EXPECT_CODE(kInvalidArgument, SlotMapping::Map(Numbers(extents), 1000, MapMode::kReadOnly));
  SP_EXPECT_CODE(kInvalidArgument, SlotMapping::Map(Numbers(extents), 1ULL << 63, MapMode::kReadOnly));
}

}  // namespace
}  // namespace sp
