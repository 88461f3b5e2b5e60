#include "os/file_tree.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "base/aligned_buffer.h"
#include "os/files.h"
#include "os/test_util.h"

namespace sp {
namespace {

Fd Open(const TemporaryDirectory& directory) { return OpenDirectory(directory.path()).value(); }

std::vector<std::string> Names(int directory) {
  std::vector<std::string> names;
  const std::vector<DirectoryEntry> entries = ReadDirectory(directory).value();
  for (const DirectoryEntry& entry : entries) names.push_back(entry.name);
  std::ranges::sort(names);
  return names;
}

TEST(FileTree, DirectoriesAreMadeAndFoundBelowTheBase) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  SP_EXPECT_CODE(kNotFound, OpenDirectoryBelow(base.get(), "a"));
  SP_ASSERT_OK_AND_ASSIGN(const std::vector<Fd> made, MakeDirectoriesBelow(base.get(), "a/b/c"));
  ASSERT_EQ(made.size(), 4u);
  SP_ASSERT_OK(SyncDirectories(made));
  SP_ASSERT_OK(MakeDirectoriesBelow(base.get(), "a/b/d"));
  SP_ASSERT_OK(MakeDirectoriesBelow(base.get(), ""));
  SP_ASSERT_OK_AND_ASSIGN(const Fd found, OpenDirectoryBelow(base.get(), "a/b"));
  EXPECT_EQ(Names(found.get()), (std::vector<std::string>{"c", "d"}));
  // Removed as far as they are empty.
  RemoveEmptyDirectoriesBelow(base.get(), "a/b/c");
  EXPECT_TRUE(IsRemoved(made.back().get()));
  EXPECT_FALSE(IsRemoved(found.get()));
  EXPECT_EQ(Names(found.get()), std::vector<std::string>{"d"});
  RemoveEmptyDirectoriesBelow(base.get(), "a/b/d");
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{});
}

TEST(FileTree, AFileInTheWayIsToldFromALink) {
  TemporaryDirectory directory;
  TemporaryDirectory outside;
  const Fd base = Open(directory);
  SP_ASSERT_OK(WriteFileAtomic(directory.File("file"), AsBytes("x"), 0600));
  SP_ASSERT_OK(WriteFileAtomic(outside.File("secret"), AsBytes("x"), 0600));
  ASSERT_EQ(::symlink(outside.path().c_str(), directory.File("link").c_str()), 0);
  ASSERT_EQ(::symlink(outside.File("secret").c_str(), directory.File("file-link").c_str()), 0);
  SP_EXPECT_CODE(kNotFound, OpenDirectoryBelow(base.get(), "file"));
  SP_EXPECT_CODE(kInvalidArgument, MakeDirectoriesBelow(base.get(), "file/a"));
  SP_EXPECT_CODE(kDenied, OpenDirectoryBelow(base.get(), "link"));
  SP_EXPECT_CODE(kDenied, MakeDirectoriesBelow(base.get(), "link/a"));
  SP_EXPECT_CODE(kDenied, OpenFileAt(base.get(), "file-link"));
  SP_EXPECT_CODE(kNotFound, OpenFileAt(base.get(), "none"));
  EXPECT_EQ(StatAt(base.get(), "file-link").value().kind, FileKind::kLink);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(outside.path()), {}), 1);
}

TEST(FileTree, WhatIsNoPlainFileIsNotFoundAndHoldsNobodyUp) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  ASSERT_EQ(::mkfifo(directory.File("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::mkdir(directory.File("directory").c_str(), 0700), 0);
  SP_EXPECT_CODE(kNotFound, OpenFileAt(base.get(), "fifo"));
  SP_EXPECT_CODE(kNotFound, OpenFileAt(base.get(), "directory"));
  EXPECT_FALSE(RemoveFileAt(base.get(), "directory").value());
  EXPECT_FALSE(RemoveFileAt(base.get(), "none").value());
  EXPECT_TRUE(RemoveFileAt(base.get(), "fifo").value());
}

TEST(FileTree, APublishedFileIsWholeAndReplacesNothing) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  const std::string big(40u << 20, 'b');  // Written behind in several steps.
  SP_ASSERT_OK_AND_ASSIGN(NewFile file, NewFile::Create(base.get(), "temporary", big.size()));
  SP_ASSERT_OK(file.Append(AsBytes(big).first(9u << 20)));
  SP_ASSERT_OK(file.Append(AsBytes(big).subspan(9u << 20)));
  SP_ASSERT_OK(file.Sync());
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{"temporary"});
  EXPECT_TRUE(file.Publish("name").value());
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{"name"});
  EXPECT_TRUE(ReadFile(directory.File("name"), big.size()).value() == big);
  // A second one, and one whose name is a directory's.
  ASSERT_EQ(::mkdir(directory.File("taken").c_str(), 0700), 0);
  for (const std::string name : {"name", "taken"}) {
    SP_ASSERT_OK_AND_ASSIGN(NewFile second, NewFile::Create(base.get(), "temporary", 0));
    SP_ASSERT_OK(second.Sync());
    EXPECT_FALSE(second.Publish(name).value());
  }
  EXPECT_EQ(Names(base.get()), (std::vector<std::string>{"name", "taken"}));
  EXPECT_EQ(std::filesystem::file_size(directory.File("name")), big.size());
}

// Whatever the alignment of pieces and memory, and whether the file system can do it (a disk's mostly, /dev/shm mostly not).
TEST(FileTree, WhatGoesPastThePageCacheIsWhatWasAppended) {
  const AlignedBuffer aligned(3u << 20);
  for (size_t i = 0; i < aligned.span().size(); ++i) aligned.span()[i] = static_cast<uint8_t>(i * 2654435761u >> 24);
  const ByteSpan bytes = aligned.span();
  TemporaryDirectory on_disk;
  const std::string in_memory = "/dev/shm/sp-test-" + std::to_string(::getpid());
  SP_ASSERT_OK(MakeDirectory(in_memory, 0700));
  for (const std::string& path : {on_disk.path(), in_memory}) {
    const Fd base = OpenDirectory(path).value();
    const std::vector<std::vector<size_t>> all_pieces = {{1u << 20, 1u << 20, 1u << 20}, {1u << 20, 5}, {4096, 4097, 8192, 100}, {7, 4096}, {2u << 20, 0, 12288}};
    for (const auto& pieces : all_pieces) {
      for (const size_t shift : {0, 1}) {
        auto file = NewFile::Create(base.get(), "temporary", 3u << 20);
        SP_ASSERT_OK(file);
        std::vector<uint8_t> expected;
        for (const size_t size : pieces) {
          const ByteSpan piece = bytes.subspan(std::min(shift, bytes.size() - size), size);
          SP_ASSERT_OK(file->Append(piece));
          expected.insert(expected.end(), piece.begin(), piece.end());
        }
        SP_ASSERT_OK(file->Sync());
        EXPECT_TRUE(file->Publish("final").value());
        const Fd written = OpenFileAt(base.get(), "final").value();
        std::vector<uint8_t> found(expected.size());
        SP_ASSERT_OK(ReadFileExact(written.get(), found, 0));
        EXPECT_EQ(found, expected);
        SP_ASSERT_OK(RemoveFileAt(base.get(), "final"));
      }
    }
  }
  std::filesystem::remove(in_memory);
}

TEST(FileTree, AFileThatIsNotPublishedGoes) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  {
    SP_ASSERT_OK_AND_ASSIGN(NewFile file, NewFile::Create(base.get(), "temporary", 100));
    SP_EXPECT_CODE(kInternal, NewFile::Create(base.get(), "temporary", 100));  // EEXIST: names are random, so this is our bug.
    NewFile moved = std::move(file);
    EXPECT_EQ(Names(base.get()), std::vector<std::string>{"temporary"});
  }
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{});
  const int before = CountOpenFds();
  SP_EXPECT_CODE(kLimit, NewFile::Create(base.get(), "temporary", uint64_t{1} << 62));  // Longer than files can be.
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{});
  EXPECT_EQ(CountOpenFds(), before);
}

TEST(FileTree, AWriterIsSeenUntilItIsGone) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  SP_EXPECT_CODE(kNotFound, WriterOf(base.get(), "temporary"));
  SP_ASSERT_OK(RemoveAbandonedFile(base.get(), "temporary"));
  {
    SP_ASSERT_OK_AND_ASSIGN(const NewFile file, NewFile::Create(base.get(), "temporary", 0));
    EXPECT_EQ(WriterOf(base.get(), "temporary").value(), Writer::kAlive);
    SP_EXPECT_CODE(kUnavailable, RemoveAbandonedFile(base.get(), "temporary"));
  }
  SP_ASSERT_OK(WriteFileAtomic(directory.File("abandoned"), AsBytes("x"), 0600));
  EXPECT_EQ(WriterOf(base.get(), "abandoned").value(), Writer::kGone);
  SP_ASSERT_OK(RemoveAbandonedFile(base.get(), "abandoned"));
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{});
}

// F62: somebody removes the temporary file of a living writer. It says so, and what has no name gets none.
TEST(FileTree, AFileWhoseTemporaryNameIsGoneIsNotPublished) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  SP_ASSERT_OK_AND_ASSIGN(NewFile file, NewFile::Create(base.get(), "temporary", 0));
  ASSERT_EQ(::unlink(directory.File("temporary").c_str()), 0);
  SP_EXPECT_CODE(kUnavailable, file.Publish("name"));
  EXPECT_EQ(Names(base.get()), std::vector<std::string>{});
}

TEST(FileTree, ErrorsOfDisksSayWhatToDo) {
  SP_EXPECT_CODE(kNoSpace, FileStatus(ENOSPC, "write"));
  SP_EXPECT_CODE(kNoSpace, FileStatus(EDQUOT, "write"));
  SP_EXPECT_CODE(kDenied, FileStatus(EROFS, "write"));
  SP_EXPECT_CODE(kDenied, FileStatus(EACCES, "write"));
  SP_EXPECT_CODE(kUnavailable, FileStatus(EIO, "write"));
  SP_EXPECT_CODE(kUnavailable, FileStatus(ESTALE, "write"));
  SP_EXPECT_CODE(kLimit, FileStatus(EFBIG, "write"));
  SP_EXPECT_CODE(kNotFound, FileStatus(ENOENT, "write"));
  EXPECT_NE(FileStatus(ENOSPC, "write x").message().find("write x: ENOSPC"), std::string::npos);
  EXPECT_NE(FileStatus(EROFS, "write").message().find("mount it writable"), std::string::npos);
}

TEST(FileTree, ReadsAreExact) {
  TemporaryDirectory directory;
  const Fd base = Open(directory);
  SP_ASSERT_OK(WriteFileAtomic(directory.File("f"), AsBytes("12345"), 0600));
  SP_ASSERT_OK_AND_ASSIGN(const Fd file, OpenFileAt(base.get(), "f"));
  std::vector<uint8_t> out(3);
  SP_ASSERT_OK(ReadFileExact(file.get(), out, 2));
  EXPECT_EQ(AsText(out), "345");
  SP_EXPECT_CODE(kCorrupt, ReadFileExact(file.get(), out, 3));
}

}  // namespace
}  // namespace sp
