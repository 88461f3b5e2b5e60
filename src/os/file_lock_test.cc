#include "os/file_lock.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>

#include "os/test_util.h"

namespace sp {
namespace {

TEST(FileLock, OneOwnerAtATime) {
  TemporaryDirectory directory;
  const std::string path = directory.File("lock");
  EXPECT_EQ(FileLockOwner(path), 0);
  {
    SP_ASSERT_OK_AND_ASSIGN(FileLock lock, FileLock::TryAcquire(path));
    EXPECT_EQ(FileLockOwner(path), ::getpid());
    const Result<FileLock> second = FileLock::TryAcquire(path);
    SP_EXPECT_CODE(kUnavailable, second);
    EXPECT_NE(second.error().message().find(std::to_string(::getpid())), std::string::npos);
    const FileLock moved = std::move(lock);
    SP_EXPECT_CODE(kUnavailable, FileLock::TryAcquire(path));
  }
  SP_ASSERT_OK(FileLock::TryAcquire(path));
}

TEST(FileLock, ForkedChildNeitherReleasesNorKeepsIt) {
  TemporaryDirectory directory;
  const std::string path = directory.File("lock");
  std::optional<FileLock> lock(FileLock::TryAcquire(path).value());
  SP_ASSERT_OK_AND_ASSIGN(Pipe dropped, Pipe::Create());
  SP_ASSERT_OK_AND_ASSIGN(Pipe hold, Pipe::Create());
  const pid_t child = ::fork();
  if (child == 0) {
    hold.write_end.Reset();
    char byte = 0;
    const bool told = ::write(dropped.write_end.get(), "x", 1) == 1;
    ::_exit(told && ::read(hold.read_end.get(), &byte, 1) == 0 ? 0 : 1);
  }
  char byte;
  ASSERT_EQ(::read(dropped.read_end.get(), &byte, 1), 1);
  SP_EXPECT_CODE(kUnavailable, FileLock::TryAcquire(path));
  lock.reset();
  SP_ASSERT_OK(FileLock::TryAcquire(path));  // Although the child still has the file open.
  hold.write_end.Reset();
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);

  lock = FileLock::TryAcquire(path).value();
  const pid_t dropper = ::fork();
  if (dropper == 0) {
    lock.reset();
    ::_exit(0);
  }
  ASSERT_EQ(::waitpid(dropper, nullptr, 0), dropper);
  SP_EXPECT_CODE(kUnavailable, FileLock::TryAcquire(path));
}

TEST(FileLock, EndsWithItsProcess) {
  TemporaryDirectory directory;
  const std::string path = directory.File("lock");
  const pid_t child = ::fork();
  if (child == 0) {
    const Result<FileLock> lock = FileLock::TryAcquire(path);
    ::_exit(lock ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  EXPECT_EQ(FileLockOwner(path), child);
  SP_ASSERT_OK(FileLock::TryAcquire(path));
}

TEST(FileLock, RefusesLinksAndDirectories) {
  TemporaryDirectory directory;
  ASSERT_EQ(::symlink("/etc/passwd", directory.File("link").c_str()), 0);
  EXPECT_FALSE(FileLock::TryAcquire(directory.File("link")).has_value());
  EXPECT_FALSE(FileLock::TryAcquire(directory.path()).has_value());
}

}  // namespace
}  // namespace sp
