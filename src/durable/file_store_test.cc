// What only a store of files has: URLs, links, permissions, full disks, killed writers. The rest: object_store_conformance_test.cc.
#include "durable/file_store.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <thread>

#include "base/crc32c.h"
#include "durable/verify.h"
#include "format/constants.h"
#include "os/fd.h"
#include "durable/store_url.h"
#include "os/files.h"
#include "os/test_util.h"

namespace sp {
namespace {

bool Contains(const Status& status, const std::string& text) { return status.message().find(text) != std::string::npos; }

class Files : public testing::Test {
 protected:
  Files() : base_(directory_.File("base")), store_(FileStore::Open("file://" + base_, clock_).value()) {}

  std::string File(const std::string& name) const { return base_ + "/" + name; }
  // All names below the base, relative, sorted.
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(base_)) names.push_back(entry.path().string().substr(base_.size() + 1));
    std::ranges::sort(names);
    return names;
  }
  std::vector<std::string> Keys(const std::string& prefix = "") {
    const ListPage page = store_->List(prefix, "", {}).value();
    std::vector<std::string> keys;
    for (const ObjectInfo& info : page.objects) keys.push_back(info.key);
    return keys;
  }
  Status Put(const std::string& key, const std::string& content) { return store_->Put(key, PutSource::OfMemory(AsBytes(content)), {}); }

  ManualClock clock_;
  TemporaryDirectory directory_;
  const std::string base_;
  std::unique_ptr<ObjectStore> store_;
};

TEST(FileUrl, IsAnAbsolutePathAndNothingElse) {
  EXPECT_EQ(PathOfFileUrl("file:///a/b").value(), "/a/b");
  EXPECT_EQ(PathOfFileUrl("file:///a/b//").value(), "/a/b");
  EXPECT_EQ(PathOfFileUrl("file:///a%20b/%c3%A4/%25").value(), "/a b/\xc3\xa4/%");
  EXPECT_EQ(PathOfFileUrl("file:///..a/...").value(), "/..a/...");
  for (const std::string url : {"", "/a", "file:", "file:/a", "file://a", "file://localhost/a", "s3://a/b", "FILE:///a", "file:///", "file:////",
                                "file:////a", "file:///a//b", "file:///a/../b", "file:///..", "file:///a/%2e%2E/b", "file:///./a", "file:///a?b",
                                "file:///a#b", "file:///a%", "file:///a%2", "file:///a%2g", "file:///a%2Fb", "file:///a%00b"}) {
    SP_EXPECT_CODE(kInvalidArgument, PathOfFileUrl(url));
  }
}

TEST(FileStoreOpen, MakesTheLastComponentOnlyAndOnlyIfToldTo) {
  TemporaryDirectory directory;
  const ManualClock clock;
  const std::string url = "file://" + directory.path();
  const auto refused = FileStore::Open(url + "/new", clock, FileStore::MissingBase::kRefuse);
  SP_EXPECT_CODE(kNotFound, refused);
  EXPECT_TRUE(Contains(refused.error(), url + "/new")) << refused.error().ToString();
  EXPECT_TRUE(Contains(refused.error(), "mount or make")) << refused.error().ToString();
  SP_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ObjectStore> store, FileStore::Open(url + "/new%20one/", clock));
  EXPECT_EQ(store->url(), url + "/new%20one");
  struct stat info {};
  ASSERT_EQ(::stat(directory.File("new one").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700u);
  SP_EXPECT_CODE(kNotFound, FileStore::Open(url + "/no/such", clock));
  SP_ASSERT_OK(WriteFileAtomic(directory.File("file"), AsBytes("x"), 0600));
  SP_EXPECT_CODE(kInvalidArgument, FileStore::Open(url + "/file", clock));
  SP_ASSERT_OK(store->Put("k", PutSource::OfMemory(AsBytes("x")), {}));
  SP_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ObjectStore> again, FileStore::Open(store->url(), clock, FileStore::MissingBase::kRefuse));
  SP_EXPECT_CODE(kOk, again->Head("k", {}));
}

TEST_F(Files, TheUmaskDecidesWhoMayRead) {
  const mode_t old = ::umask(027);
  SP_EXPECT_CODE(kOk, Put("a/key", "content"));
  ::umask(old);
  struct stat file {}, folder {};
  ASSERT_EQ(::stat(File("a/key").c_str(), &file), 0);
  ASSERT_EQ(::stat(File("a").c_str(), &folder), 0);
  EXPECT_EQ(file.st_mode & 07777, 0640u);
  EXPECT_EQ(folder.st_mode & 07777, 0750u);
}

TEST_F(Files, ObjectsAreFilesAndNothingElseStays) {
  SP_ASSERT_OK(Put("ns/step-1/rank-0", "content"));
  EXPECT_TRUE(store_->Create("ns/step-1/manifest.json", AsBytes("{}"), {}).value());
  EXPECT_FALSE(store_->Create("ns/step-1/manifest.json", AsBytes("[]"), {}).value());
  EXPECT_EQ(ReadFile(File("ns/step-1/rank-0"), 100).value(), "content");
  SP_ASSERT_OK(store_->Probe({}));
  EXPECT_EQ(Names(), (std::vector<std::string>{"ns", "ns/step-1", "ns/step-1/manifest.json", "ns/step-1/rank-0"}));
  SP_ASSERT_OK(store_->Delete("ns/step-1/rank-0", {}));
  SP_ASSERT_OK(store_->Delete("ns/step-1/manifest.json", {}));
  EXPECT_EQ(Names(), std::vector<std::string>{});
}

TEST_F(Files, FoldersComeBackAsFastAsDeleteRemovesThem) {
  std::atomic<bool> stop = false;
  std::thread remover([&] {
    while (!stop) {
      if (!store_->Delete("a/b/c/other", {}).ok()) ADD_FAILURE();
      std::error_code ignored;
      for (const char* folder : {"a/b/c", "a/b", "a"}) std::filesystem::remove(File(folder), ignored);
    }
  });
  for (int i = 0; i < 100; ++i) {
    const std::string key = "a/b/c/key-" + std::to_string(i);
    SP_EXPECT_CODE(kOk, Put(key, "content"));
    SP_EXPECT_CODE(kOk, store_->Delete(key, {}));
  }
  stop = true;
  remover.join();
}

TEST_F(Files, NoLinkBelowTheBaseIsFollowed) {
  TemporaryDirectory outside;
  SP_ASSERT_OK(WriteFileAtomic(outside.File("secret"), AsBytes("secret"), 0600));
  SP_ASSERT_OK(Put("a/key", "content"));
  ASSERT_EQ(::symlink(outside.path().c_str(), File("folder").c_str()), 0);
  ASSERT_EQ(::symlink(outside.File("secret").c_str(), File("a/link").c_str()), 0);
  ASSERT_EQ(::symlink(outside.File("new").c_str(), File("a/dangling").c_str()), 0);
  std::vector<uint8_t> out(1);
  for (const std::string key : {"folder/secret", "a/link", "a/dangling"}) {
    SP_EXPECT_CODE(kDenied, store_->Head(key, {}));
    SP_EXPECT_CODE(kDenied, store_->ReadRange(key, 0, out, {}));
    SP_EXPECT_CODE(kDenied, Put(key, "secret"));
  }
  SP_EXPECT_CODE(kDenied, Put("folder/new", "x"));
  SP_EXPECT_CODE(kDenied, store_->Create("folder/new", AsBytes("x"), {}));
  SP_EXPECT_CODE(kDenied, store_->Delete("folder/secret", {}));
  EXPECT_FALSE(store_->Create("a/dangling", AsBytes("x"), {}).value());  // The name is taken; what it points to is not made.
  EXPECT_EQ(Keys(), std::vector<std::string>{"a/key"});
  EXPECT_EQ(store_->ListUploads("", {}).value().size(), 0u);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(outside.path()), {}), 1);
  // The base itself may be reached through one.
  ASSERT_EQ(::symlink(base_.c_str(), directory_.File("way").c_str()), 0);
  SP_ASSERT_OK_AND_ASSIGN(const auto other, FileStore::Open("file://" + directory_.File("way"), clock_));
  SP_EXPECT_CODE(kOk, other->Head("a/key", {}));
}

TEST_F(Files, ForeignNamesAreNotObjects) {
  SP_ASSERT_OK(Put("a/key", "content"));
  SP_ASSERT_OK(WriteFileAtomic(File("a/with space"), AsBytes("x"), 0600));
  std::filesystem::create_directories(File("a folder/b"));
  SP_ASSERT_OK(WriteFileAtomic(File("a folder/b/key"), AsBytes("x"), 0600));
  ASSERT_EQ(::mkfifo(File("a/fifo").c_str(), 0600), 0);
  std::filesystem::create_directories(File(".safepoint-probe"));
  SP_ASSERT_OK(WriteFileAtomic(File(".safepoint-probe/of-a-dead-daemon"), AsBytes("x"), 0600));
  EXPECT_EQ(Keys(), std::vector<std::string>{"a/key"});
  SP_EXPECT_CODE(kNotFound, store_->Head("a/fifo", {}));
  SP_EXPECT_CODE(kInvalidArgument, Put("a/fifo", "x"));
}

TEST_F(Files, AKeyIsNoOtherKeysFolder) {
  SP_ASSERT_OK(Put("a/b", "content"));
  const Status below = Put("a/b/c", "x");
  EXPECT_EQ(below.code(), StatusCode::kInvalidArgument) << below.ToString();
  EXPECT_TRUE(Contains(below, "nothing can lie below it")) << below.ToString();
  SP_EXPECT_CODE(kInvalidArgument, Put("a", "x"));
  SP_EXPECT_CODE(kInvalidArgument, Put(std::string(256, 'n'), "x"));
  SP_EXPECT_CODE(kOk, Put(std::string(255, 'n'), "x"));
}

TEST_F(Files, NamesOfTemporaryFilesAreNoKeys) {
  SP_EXPECT_CODE(kInvalidArgument, Put(".safepoint-upload-x", "x"));
  SP_EXPECT_CODE(kInvalidArgument, store_->Create("a/.safepoint-upload-x/b", AsBytes("x"), {}));
  for (const std::string id : {"key", "../key", ".safepoint-upload-/../../key", ""}) {
    SP_EXPECT_CODE(kInvalidArgument, store_->AbortUpload({"a/key", id, 0}, {}));
  }
  SP_EXPECT_CODE(kInvalidArgument, store_->AbortUpload({"../a/key", ".safepoint-upload-x", 0}, {}));
}

TEST_F(Files, LongNamesStillHaveTemporaryOnes) {
  const std::string name(255, 'n');
  std::vector<UnfinishedUpload> uploads;
  std::filesystem::create_directories(File("a"));
  SP_ASSERT_OK(WriteFileAtomic(File("a/" + (".safepoint-upload-" + std::string(32, '0') + "-" + name).substr(0, 230)), AsBytes("x"), 0600));
  uploads = store_->ListUploads("a/nnn", {}).value();
  ASSERT_EQ(uploads.size(), 1u);
  EXPECT_TRUE(("a/" + name).starts_with(uploads[0].key));
  SP_ASSERT_OK(store_->AbortUpload(uploads[0], {}));
  EXPECT_EQ(Names(), std::vector<std::string>{});
}

TEST_F(Files, ADeadlineThatPassesOnTheWayLeavesNothing) {
  const std::vector<uint8_t> content(20 * kBlockBytes, 1);
  const CallLimits limits{.deadline = clock_.Now() + 10, .progress = [&](uint64_t) { clock_.Advance(8); }};
  SP_EXPECT_CODE(kDeadline, store_->Put("a/key", PutSource::OfMemory(content), limits));
  SP_EXPECT_CODE(kNotFound, store_->Head("a/key", {}));
  EXPECT_EQ(store_->ListUploads("", {}).value().size(), 0u);
  EXPECT_EQ(Names(), std::vector<std::string>{"a"});
}

// I-31: that a directory is gone says nothing about what was in it.
TEST_F(Files, ARemovedBaseIsUnavailableNotEmpty) {
  SP_ASSERT_OK(Put("a/key", "content"));
  std::filesystem::remove_all(base_);
  std::vector<uint8_t> out(1);
  SP_EXPECT_CODE(kUnavailable, store_->Head("a/key", {}));
  SP_EXPECT_CODE(kUnavailable, store_->ReadRange("a/key", 0, out, {}));
  SP_EXPECT_CODE(kUnavailable, store_->List("", "", {}));
  SP_EXPECT_CODE(kUnavailable, store_->Delete("a/key", {}));
  SP_EXPECT_CODE(kUnavailable, store_->Create("key", {}, {}));
  SP_EXPECT_CODE(kUnavailable, Put("a/key", "content"));
  const auto probed = store_->Probe({});
  SP_EXPECT_CODE(kUnavailable, probed);
  EXPECT_TRUE(Contains(probed.error(), "base directory has been removed")) << probed.error().ToString();
}

// F61: killed in the middle of a Put. While the writer lives his upload is left alone; afterwards it is found and removed, and no object is seen.
TEST_F(Files, AKilledWriterLeavesNoObjectAndOneUpload) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe pipe, Pipe::Create());
  const std::vector<uint8_t> content(64 * kBlockBytes, 3);
  const PutSource source = PutSource::OfMemory(content);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const CallLimits limits{.progress = [&](uint64_t) {
      if (::write(pipe.write_end.get(), "x", 1) != 1) ::_exit(1);
      for (;;) ::pause();
    }};
    const Status ignored = store_->Put("ns/step-1/rank-0", source, limits);
    ::_exit(2);
  }
  pipe.write_end.Reset();
  char byte;
  ASSERT_EQ(::read(pipe.read_end.get(), &byte, 1), 1);
  EXPECT_EQ(store_->ListUploads("", {}).value().size(), 0u);
  const auto of_the_living = Names();
  ASSERT_EQ(of_the_living.size(), 3u);
  SP_EXPECT_CODE(kUnavailable, store_->AbortUpload({"ns/step-1/rank-0", of_the_living[2].substr(std::string("ns/step-1/").size()), 0}, {}));
  ASSERT_EQ(::kill(child, SIGKILL), 0);
  int how = 0;
  ASSERT_EQ(::waitpid(child, &how, 0), child);
  ASSERT_TRUE(WIFSIGNALED(how));

  SP_EXPECT_CODE(kNotFound, store_->Head("ns/step-1/rank-0", {}));
  EXPECT_EQ(Keys(), std::vector<std::string>{});
  SP_ASSERT_OK_AND_ASSIGN(const std::vector<UnfinishedUpload> uploads, store_->ListUploads("ns/step-1/rank-0", {}));
  ASSERT_EQ(uploads.size(), 1u);
  EXPECT_EQ(uploads[0].key, "ns/step-1/rank-0");
  EXPECT_GT(uploads[0].started_unix_s, 1'000'000'000);
  SP_ASSERT_OK(store_->Put("ns/step-1/rank-0", source, {}));
  SP_ASSERT_OK(store_->AbortUpload(uploads[0], {}));
  EXPECT_EQ(Names(), (std::vector<std::string>{"ns", "ns/step-1", "ns/step-1/rank-0"}));
  SP_ASSERT_OK(VerifyObject(*store_, "ns/step-1/rank-0", content.size(), source.block_crcs, {}));
}

// Runs `body` in a child that may do what this process must not: mount, or become another user. 77: not possible here.
int InChild(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int how = 0;
  if (child < 0 || ::waitpid(child, &how, 0) != child || !WIFEXITED(how)) return -1;
  return WEXITSTATUS(how);
}

int Fail(int code, const Status& status) {
  std::fprintf(stderr, "child: %s\n", status.ToString().c_str());
  return code;
}

TEST_F(Files, WithoutPermissionIsDeniedAndSaysSo) {
  SP_ASSERT_OK(Put("a/key", "content"));
  const int result = InChild([&] {
    ::chmod(directory_.path().c_str(), 0755);
    ::chmod(base_.c_str(), 0755);
    ::chmod(File("a").c_str(), 0555);
    if (::geteuid() == 0 && (::setgid(65534) != 0 || ::setuid(65534) != 0)) return 77;
    if (!store_->Head("a/key", {}).has_value()) return 1;
    const Status put = Put("a/new", "x");
    if (put.code() != StatusCode::kDenied || !Contains(put, store_->url() + "/a/new") || !Contains(put, "give user")) return Fail(2, put);
    const auto probed = store_->Probe({});
    if (::geteuid() == 65534 && (probed || probed.error().code() != StatusCode::kDenied)) return 3;
    const Status deleted = store_->Delete("a/key", {});
    return deleted.code() == StatusCode::kDenied ? 0 : Fail(4, deleted);
  });
  if (result == 77) GTEST_SKIP() << "cannot become another user";
  EXPECT_EQ(result, 0);
}

// A tmpfs of 4 MiB in a mount namespace of the child's own.
TEST_F(Files, AFullOrReadOnlyDiskSaysSoAndLeavesNothing) {
  const int result = InChild([&] {
    if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return 77;
    if (::mount("tmpfs", base_.c_str(), "tmpfs", 0, "size=4m") != 0) return 77;
    const auto opened = FileStore::Open("file://" + base_, clock_);
    if (!opened) return Fail(1, opened.error());
    ObjectStore& store = **opened;
    const std::vector<uint8_t> content(5 * kBlockBytes, 1);
    uint64_t progress = 0;
    const Status put = store.Put("a/key", PutSource::OfMemory(content), {.progress = [&](uint64_t bytes) { progress += bytes; }});
    if (put.code() != StatusCode::kNoSpace || !Contains(put, store.url() + "/a/key") || !Contains(put, "make room")) return Fail(2, put);
    if (progress != 0) return 3;  // Refused before any byte was accepted.
    if (!store.ListUploads("", {}).value().empty() || store.Head("a/key", {}).has_value()) return 4;
    if (const Status small = store.Put("a/key", PutSource::OfMemory(ByteSpan(content).first(kBlockBytes)), {}); !small.ok()) return Fail(5, small);
    if (::mount(nullptr, base_.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) != 0) return 77;
    const Status read_only = store.Put("a/other", PutSource::OfMemory({}), {});
    if (read_only.code() != StatusCode::kDenied || !Contains(read_only, "mount it writable")) return Fail(6, read_only);
    const auto probed = store.Probe({});
    if (probed || probed.error().code() != StatusCode::kDenied) return 7;
    return store.Head("a/key", {}).has_value() ? 0 : 8;
  });
  if (result == 77) GTEST_SKIP() << "cannot mount here";
  EXPECT_EQ(result, 0);
}

}  // namespace
}  // namespace sp
