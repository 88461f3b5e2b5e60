// Each system call of a Put fails once: it is reported, nothing half is seen, nothing is left, and the next Put succeeds. The calls are this
// program's own functions below, which the linker prefers to the C library's.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>

#include "base/crc32c.h"
#include "durable/file_store.h"
#include "durable/verify.h"
#include "format/constants.h"
#include "os/test_util.h"

namespace {

enum Call { kOpenat, kMkdirat, kFallocate, kPwrite, kSyncFileRange, kFsync, kLinkat, kRenameat2, kUnlinkat, kFlock, kCalls };

std::atomic<int> countdown[kCalls];     // The n-th call from now fails; -1: each does; 0: none.
std::atomic<int> error_of[kCalls];      // Their errno.
std::atomic<int> failed;                // How many did.
std::atomic<bool> fail_after;           // The call is carried out all the same.
std::atomic<bool> no_direct;            // As on a file system that knows no O_DIRECT.

bool Fails(Call call) {
  const int n = countdown[call];
  if (n == 0) return false;
  if (n > 0 && --countdown[call] != 0) return false;
  ++failed;
  return true;
}

long Do(Call call, long number, long a, long b = 0, long c = 0, long d = 0, long e = 0) {
  if (!Fails(call)) return ::syscall(number, a, b, c, d, e);
  if (fail_after) ::syscall(number, a, b, c, d, e);
  errno = error_of[call];
  return -1;
}

long Arg(const void* pointer) { return reinterpret_cast<long>(pointer); }

}  // namespace

extern "C" {

int openat(int directory, const char* name, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const long mode = (flags & O_CREAT) != 0 ? va_arg(arguments, int) : 0;
  va_end(arguments);
  return static_cast<int>(Do(kOpenat, SYS_openat, directory, Arg(name), flags, mode));
}
int mkdirat(int directory, const char* name, mode_t mode) noexcept {
  return static_cast<int>(Do(kMkdirat, SYS_mkdirat, directory, Arg(name), mode));
}
int fallocate(int fd, int mode, off_t offset, off_t length) { return static_cast<int>(Do(kFallocate, SYS_fallocate, fd, mode, offset, length)); }
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  return Do(kPwrite, SYS_pwrite64, fd, Arg(data), static_cast<long>(size), offset);
}
int sync_file_range(int fd, off_t offset, off_t length, unsigned flags) {
  return static_cast<int>(Do(kSyncFileRange, SYS_sync_file_range, fd, offset, length, flags));
}
int fsync(int fd) { return static_cast<int>(Do(kFsync, SYS_fsync, fd)); }
int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) noexcept {
  return static_cast<int>(Do(kLinkat, SYS_linkat, from_directory, Arg(from), to_directory, Arg(to), flags));
}
int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) noexcept {
  return static_cast<int>(Do(kRenameat2, SYS_renameat2, from_directory, Arg(from), to_directory, Arg(to), flags));
}
int unlinkat(int directory, const char* name, int flags) noexcept {
  return static_cast<int>(Do(kUnlinkat, SYS_unlinkat, directory, Arg(name), flags));
}
int flock(int fd, int operation) noexcept { return static_cast<int>(Do(kFlock, SYS_flock, fd, operation)); }
int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  const long argument = va_arg(arguments, long);  // Whatever it is: all of them fit.
  va_end(arguments);
  if (no_direct && command == F_SETFL && (argument & O_DIRECT) != 0) {
    errno = EINVAL;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_fcntl, fd, command, argument));
}

}  // extern "C"

namespace sp {
namespace {

class FileFaults : public testing::Test {
 protected:
  FileFaults() : store_(FileStore::Open("file://" + directory_.File("base"), clock_).value()) {}
  ~FileFaults() override { Mend(); }

  void Break(Call call, int nth, int err) {
    failed = 0;
    error_of[call] = err;
    countdown[call] = nth;
  }
  void Mend() {
    for (auto& n : countdown) n = 0;
    fail_after = false;
    no_direct = false;
  }
  PutSource Source(size_t size) {
    content_.assign(size, 0x5a);
    return PutSource::OfMemory(content_);
  }

  ManualClock clock_;
  TemporaryDirectory directory_;
  std::unique_ptr<ObjectStore> store_;
  std::vector<uint8_t> content_;
};

TEST_F(FileFaults, EveryFailedCallIsReportedAndLeavesNothingHalf) {
  struct Case {
    Call call;
    int err;
    StatusCode code;
    size_t size = kBlockBytes + 5;
    bool through_the_cache = false;
  };
  const Case cases[] = {{kOpenat, EMFILE, StatusCode::kLimit},
                        {kOpenat, EIO, StatusCode::kUnavailable},
                        {kMkdirat, EDQUOT, StatusCode::kNoSpace},
                        {kFallocate, ENOSPC, StatusCode::kNoSpace},
                        {kPwrite, ENOSPC, StatusCode::kNoSpace},
                        {kPwrite, EIO, StatusCode::kUnavailable},
                        {kPwrite, ENOSPC, StatusCode::kNoSpace, kBlockBytes + 5, true},
                        {kSyncFileRange, EIO, StatusCode::kUnavailable, 80 * kBlockBytes, true},
                        {kSyncFileRange, ENOSPC, StatusCode::kNoSpace, 80 * kBlockBytes, true},
                        {kFsync, EIO, StatusCode::kUnavailable},
                        {kFsync, ENOSPC, StatusCode::kNoSpace},
                        {kLinkat, EIO, StatusCode::kUnavailable},
                        {kLinkat, EACCES, StatusCode::kDenied}};
  for (const Case& each : cases) {
    const PutSource source = Source(each.size);
    int nth = 1;
    for (;; ++nth) {
      const std::string what = "call " + std::to_string(each.call) + " failing as number " + std::to_string(nth);
      Break(each.call, nth, each.err);
      no_direct = each.through_the_cache;
      const Status put = store_->Put("ns/step/rank-0", source, {});
      Mend();
      if (failed == 0) {
        EXPECT_TRUE(put.ok()) << what << ": " << put.ToString();
        SP_ASSERT_OK(store_->Delete("ns/step/rank-0", {}));
        break;
      }
      EXPECT_EQ(put.code(), each.code) << what << ": " << put.ToString();
      EXPECT_NE(put.message().find(store_->url() + "/ns/step/rank-0"), std::string::npos) << put.ToString();
      // The name may be there (the last fsync is after it): then all of it is.
      if (store_->Head("ns/step/rank-0", {})) SP_ASSERT_OK(VerifyObject(*store_, "ns/step/rank-0", each.size, source.block_crcs, {}));
      EXPECT_EQ(store_->ListUploads("", {}).value().size(), 0u) << what;
      SP_ASSERT_OK(store_->Put("ns/step/rank-0", source, {}));
      SP_ASSERT_OK(store_->Delete("ns/step/rank-0", {}));
    }
    EXPECT_GT(nth, 1) << "call " << each.call << " is not made";
  }
}

TEST_F(FileFaults, WithoutRoomTakenAheadOrEarlyWritingPutsStillWork) {
  const PutSource source = Source(80 * kBlockBytes);
  Break(kFallocate, -1, EOPNOTSUPP);
  Break(kSyncFileRange, -1, ENOSYS);
  no_direct = true;
  SP_ASSERT_OK(store_->Put("key", source, {}));
  EXPECT_GT(failed, 1);
  Mend();
  SP_ASSERT_OK(VerifyObject(*store_, "key", content_.size(), source.block_crcs, {}));
}

TEST_F(FileFaults, AFileSystemThatWantsAnotherAlignmentIsWrittenThroughTheCache) {
  const PutSource source = Source(3 * kBlockBytes + 5);
  for (const int nth : {1, 2, 4}) {
    Break(kPwrite, nth, EINVAL);
    const Status put = store_->Put("key", source, {});
    Mend();
    // The last piece goes through the cache anyway: there it means what it says.
    EXPECT_EQ(put.ok(), nth < 4) << put.ToString();
    if (put.ok()) SP_ASSERT_OK(VerifyObject(*store_, "key", content_.size(), source.block_crcs, {}));
    SP_ASSERT_OK(store_->Delete("key", {}));
  }
}

TEST_F(FileFaults, WithoutHardLinksNamesAreStillGivenOnce) {
  Break(kLinkat, -1, EPERM);
  EXPECT_TRUE(store_->Create("key", AsBytes("first"), {}).value());
  EXPECT_FALSE(store_->Create("key", AsBytes("other"), {}).value());
  EXPECT_TRUE(store_->Probe({}).value().conditional_create);
  EXPECT_EQ(store_->ListUploads("", {}).value().size(), 0u);
  Mend();
  std::vector<uint8_t> out(5);
  SP_ASSERT_OK(store_->ReadRange("key", 0, out, {}));
  EXPECT_EQ(AsText(out), "first");
}

TEST_F(FileFaults, AFileSystemThatCannotKeepWritersApartIsRefused) {
  Break(kLinkat, -1, EOPNOTSUPP);
  Break(kRenameat2, -1, EINVAL);
  SP_EXPECT_CODE(kInvalidArgument, store_->Create("key", AsBytes("x"), {}));
  SP_EXPECT_CODE(kInvalidArgument, store_->Probe({}));
  EXPECT_EQ(store_->List("", "", {}).value().objects.size(), 0u);
  EXPECT_EQ(store_->ListUploads("", {}).value().size(), 0u);
}

// F60 on a network file system: the link was made, its answer lost, and the kernel's second request meets its own success.
TEST_F(FileFaults, OurOwnLinkIsNotTakenForSomebodyElses) {
  fail_after = true;
  Break(kLinkat, 1, EEXIST);
  EXPECT_TRUE(store_->Create("key", AsBytes("ours"), {}).value());
  EXPECT_EQ(failed, 1);
  EXPECT_FALSE(store_->Create("key", AsBytes("ours"), {}).value());
}

TEST_F(FileFaults, ATemporaryNameThatStaysIsSweptAndTheObjectWithItNot) {
  Break(kUnlinkat, 1, EIO);
  EXPECT_TRUE(store_->Create("a/key", AsBytes("content"), {}).value());
  Mend();
  SP_ASSERT_OK_AND_ASSIGN(const std::vector<UnfinishedUpload> uploads, store_->ListUploads("", {}));
  ASSERT_EQ(uploads.size(), 1u);
  EXPECT_EQ(uploads[0].key, "a/key");
  SP_ASSERT_OK(store_->AbortUpload(uploads[0], {}));
  EXPECT_EQ(store_->Head("a/key", {}).value().size_bytes, 7u);
}

// Without locks nobody knows whether a writer lives; the sweep has to go by age.
TEST_F(FileFaults, WithoutLocksUploadsOfTheLivingAreReported) {
  Break(kFlock, -1, ENOLCK);
  size_t seen = 0;
  SP_ASSERT_OK(store_->Put("key", Source(10), {.progress = [&](uint64_t) { seen = store_->ListUploads("", {}).value().size(); }}));
  EXPECT_EQ(seen, 1u);
}

// F62: the temporary file is removed while it is written.
TEST_F(FileFaults, AnAbortedPutSaysSoAndTheNextSucceeds) {
  Break(kFlock, -1, ENOLCK);
  const PutSource source = Source(10);
  SP_EXPECT_CODE(kUnavailable, store_->Put("a/key", source, {.progress = [&](uint64_t) {
    for (const UnfinishedUpload& upload : std::vector<UnfinishedUpload>(store_->ListUploads("", {}).value())) {
      EXPECT_TRUE(store_->AbortUpload(upload, {}).ok());
    }
  }}));
  SP_EXPECT_CODE(kNotFound, store_->Head("a/key", {}));
  SP_ASSERT_OK(store_->Put("a/key", source, {}));
}

}  // namespace
}  // namespace sp
