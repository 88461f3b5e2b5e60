#include "os/memfd.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <vector>

#include "os/mapping.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr uint64_t kSize = 1 << 20;

TEST(Memfd, IsPrivateCloseOnExecAndOfTheSizeAsked) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kSize));
  struct stat info {};
  ASSERT_EQ(::fstat(fd.get(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
  EXPECT_EQ(static_cast<uint64_t>(info.st_size), kSize);
  EXPECT_EQ(::fcntl(fd.get(), F_GETFD), FD_CLOEXEC);
}

// Linux fact 1: after a truncation our mapped read would die of SIGBUS.
TEST(Memfd, SealedSizeRefusesTruncationAndFurtherSeals) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kSize));
  SP_EXPECT_CODE(kProtocol, CheckSealedSize(fd.get(), kSize));
  SP_ASSERT_OK(SealSize(fd.get()));
  EXPECT_EQ(::ftruncate(fd.get(), kSize / 2), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::ftruncate(fd.get(), kSize * 2), -1);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_WRITE), -1);
  SP_ASSERT_OK(CheckSealedSize(fd.get(), kSize));
  SP_EXPECT_CODE(kProtocol, CheckSealedSize(fd.get(), kSize + 4096));
}

TEST(Memfd, CheckRefusesOrdinaryFilesAndHalfSeals) {
  TemporaryDirectory directory;
  Fd file(::open(directory.File("f").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), kSize), 0);
  SP_EXPECT_CODE(kProtocol, CheckSealedSize(file.get(), kSize));

  SP_ASSERT_OK_AND_ASSIGN(const Fd half, CreateMemfd("test", kSize));
  ASSERT_EQ(::fcntl(half.get(), F_ADD_SEALS, F_SEAL_GROW), 0);
  SP_EXPECT_CODE(kProtocol, CheckSealedSize(half.get(), kSize));
}

TEST(Memfd, ReadOnlyCopyCannotBeWritten) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kSize));
  SP_ASSERT_OK(PWriteExact(fd.get(), AsBytes("hello"), 100));
  SP_ASSERT_OK_AND_ASSIGN(const Fd reader, ReopenReadOnly(fd.get()));
  std::vector<uint8_t> got(5);
  SP_ASSERT_OK(PReadExact(reader.get(), got, 100));
  EXPECT_EQ(AsText(got), "hello");
  EXPECT_FALSE(PWriteExact(reader.get(), AsBytes("x"), 0).ok());
  SP_EXPECT_CODE(kDenied, Mapping::MapShared(reader.get(), kSize, MapMode::kReadWrite, false));
}

TEST(Memfd, PrefaultGivesEveryPageAndKeepsContents) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kSize));
  SP_ASSERT_OK(PWriteExact(fd.get(), AsBytes("kept"), 8192));
  struct stat info {};
  ASSERT_EQ(::fstat(fd.get(), &info), 0);
  ASSERT_LT(static_cast<uint64_t>(info.st_blocks) * 512, kSize);
  SP_ASSERT_OK(Prefault(fd.get(), kSize));
  ASSERT_EQ(::fstat(fd.get(), &info), 0);
  EXPECT_EQ(static_cast<uint64_t>(info.st_blocks) * 512, kSize);
  std::vector<uint8_t> got(4);
  SP_ASSERT_OK(PReadExact(fd.get(), got, 8192));
  EXPECT_EQ(AsText(got), "kept");
}

TEST(Memfd, PrefaultBeyondTheEndIsAnErrorNotASignal) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", kSize));
  SP_EXPECT_CODE(kInvalidArgument, Prefault(fd.get(), kSize + 4096));
}

// A full file system stands in for a full machine: the same page fault fails.
TEST(Memfd, PrefaultWithoutRoomIsNoSpaceNotASignal) {
  constexpr uint64_t kHuge = 1ULL << 30;
  TemporaryDirectory directory;
  if (::system(("mount -t tmpfs -o size=1m none " + directory.path() + " 2>/dev/null").c_str()) != 0) {
    GTEST_SKIP() << "may not mount a small tmpfs";
  }
  {
    Fd file(::open(directory.File("f").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    ASSERT_TRUE(file.valid());
    ASSERT_EQ(::ftruncate(file.get(), static_cast<off_t>(kHuge)), 0);
    SP_EXPECT_CODE(kNoSpace, Prefault(file.get(), kHuge));
  }
  ASSERT_EQ(::system(("umount " + directory.path()).c_str()), 0);
}

TEST(Exact, ShortFileIsCorruptWithNumbers) {
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("test", 4096));
  std::vector<uint8_t> got(100);
  const Status status = PReadExact(fd.get(), got, 4050);
  SP_EXPECT_CODE(kCorrupt, status);
  EXPECT_NE(status.message().find("100 bytes at 4050"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("ends after 46"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace sp
