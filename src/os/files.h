// Small files and private directories. Thread-safe.
#pragma once

#include <sys/types.h>

#include <string>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

// The whole file. kLimit when it is longer than `max_bytes`, kNotFound when it does not exist. Works for /proc, whose
// files have no size.
Result<std::string> ReadFile(const std::string& path, size_t max_bytes);

// Replaces the file, or makes it: afterwards, and after a crash at any point, it has the old or the new content, never
// a mixture. On success the new content is on disk.
Status WriteFileAtomic(const std::string& path, ByteSpan content, mode_t mode);

// Makes the file if there is none; one that exists keeps its content. One step, so that a crash at any point leaves it
// or nothing, and nothing beside it. On success it is on disk.
Status MakeEmptyFile(const std::string& path, mode_t mode);

// OK also when there is no such file.
Status RemoveFile(const std::string& path);

// mkdir -p, each new directory 0700. kDenied unless the last one is a real directory (no symbolic link) of this user
// that neither group nor others can write.
Status MakePrivateDirectories(const std::string& path);

}  // namespace sp
