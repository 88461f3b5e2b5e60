#include "os/files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "os/test_util.h"

namespace sp {
namespace {

TEST(Files, AtomicWriteReplacesWithModeAndLeavesNothingElse) {
  TemporaryDirectory directory;
  const std::string path = directory.File("f");
  SP_ASSERT_OK(WriteFileAtomic(path, AsBytes("first"), 0600));
  SP_ASSERT_OK(WriteFileAtomic(path, AsBytes(""), 0644));
  SP_ASSERT_OK(WriteFileAtomic(path, AsBytes(std::string(100'000, 'x')), 0666));
  SP_ASSERT_OK_AND_ASSIGN(const std::string content, ReadFile(path, 100'000));
  EXPECT_EQ(content, std::string(100'000, 'x'));
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0666u);
  // A directory in the way: the error names the path, and the temporary file is gone.
  ASSERT_EQ(::mkdir(directory.File("d").c_str(), 0700), 0);
  EXPECT_FALSE(WriteFileAtomic(directory.File("d"), AsBytes("x"), 0600).ok());
  SP_EXPECT_CODE(kNotFound, WriteFileAtomic(directory.File("no/f"), AsBytes("x"), 0600));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 2);
}

TEST(Files, AnEmptyFileIsMadeOnceAndKeepsWhatItHas) {
  TemporaryDirectory directory;
  const std::string path = directory.File("f");
  SP_ASSERT_OK(MakeEmptyFile(path, 0600));
  EXPECT_EQ(ReadFile(path, 1).value(), "");
  SP_ASSERT_OK(WriteFileAtomic(path, AsBytes("kept"), 0600));
  SP_ASSERT_OK(MakeEmptyFile(path, 0640));
  EXPECT_EQ(ReadFile(path, 4).value(), "kept");
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
  SP_EXPECT_CODE(kNotFound, MakeEmptyFile(directory.File("no/f"), 0600));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1);
}

TEST(Files, ReadIsBounded) {
  TemporaryDirectory directory;
  const std::string path = directory.File("f");
  SP_ASSERT_OK(WriteFileAtomic(path, AsBytes("12345"), 0600));
  SP_EXPECT_CODE(kLimit, ReadFile(path, 4));
  EXPECT_EQ(ReadFile(path, 5).value(), "12345");
  SP_EXPECT_CODE(kNotFound, ReadFile(directory.File("none"), 5));
  SP_EXPECT_CODE(kLimit, ReadFile("/dev/zero", 100'000));
  EXPECT_GT(ReadFile("/proc/self/status", 1 << 16)->size(), 100u);
}

TEST(Files, RemoveIsIdempotent) {
  TemporaryDirectory directory;
  SP_ASSERT_OK(WriteFileAtomic(directory.File("f"), AsBytes("x"), 0600));
  SP_ASSERT_OK(RemoveFile(directory.File("f")));
  SP_EXPECT_CODE(kNotFound, ReadFile(directory.File("f"), 1));
  SP_ASSERT_OK(RemoveFile(directory.File("f")));
  EXPECT_FALSE(RemoveFile(directory.path()).ok());
}

TEST(Files, PrivateDirectories) {
  TemporaryDirectory directory;
  const std::string path = directory.File("a/b/c");
  SP_ASSERT_OK(MakePrivateDirectories(path));
  SP_ASSERT_OK(MakePrivateDirectories(path));
  SP_ASSERT_OK(MakePrivateDirectories(path + "/"));
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  ASSERT_EQ(::chmod(path.c_str(), 0720), 0);
  SP_EXPECT_CODE(kDenied, MakePrivateDirectories(path));
  ASSERT_EQ(::chmod(path.c_str(), 0702), 0);
  SP_EXPECT_CODE(kDenied, MakePrivateDirectories(path));
  ASSERT_EQ(::symlink(directory.File("a").c_str(), directory.File("link").c_str()), 0);
  SP_EXPECT_CODE(kDenied, MakePrivateDirectories(directory.File("link")));
  SP_ASSERT_OK(WriteFileAtomic(directory.File("f"), AsBytes("x"), 0600));
  SP_EXPECT_CODE(kDenied, MakePrivateDirectories(directory.File("f")));
  SP_EXPECT_CODE(kInvalidArgument, MakePrivateDirectories(directory.File("f/g")));
  if (::geteuid() == 0) {
    ASSERT_EQ(::mkdir(directory.File("other").c_str(), 0700), 0);
    ASSERT_EQ(::chown(directory.File("other").c_str(), 12345, 12345), 0);
    SP_EXPECT_CODE(kDenied, MakePrivateDirectories(directory.File("other")));
  }
}

}  // namespace
}  // namespace sp
