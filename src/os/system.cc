#include "os/system.h"

#include <sys/random.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <optional>
#include <string_view>

#include "base/check.h"
#include "os/errors.h"
#include "os/files.h"

namespace sp {
namespace {

constexpr size_t kFactFileBytesMax = 1 << 20;

std::optional<uint64_t> ParseNumber(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return std::nullopt;
  return value;
}

// The number after "key" and blanks at the start of a line.
std::optional<uint64_t> FindField(std::string_view text, std::string_view key) {
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string_view line = text.substr(at, end - at);
    if (line.starts_with(key)) {
      line.remove_prefix(key.size());
      const size_t digits = line.find_first_not_of(" \t");
      if (digits != 0 && digits != std::string_view::npos) return ParseNumber(line.substr(digits));
    }
    at = end + 1;
  }
  return std::nullopt;
}

std::optional<uint64_t> ReadNumber(const std::string& path) {
  const Result<std::string> text = ReadFile(path, kFactFileBytesMax);
  return text ? ParseNumber(*text) : std::nullopt;  // "max" is no number, and no limit.
}

struct CgroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* reclaimable_key;  // In memory.stat.
};
constexpr CgroupFiles kVersion1{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                "total_inactive_file"};
constexpr CgroupFiles kVersion2{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};

// What the groups from `path` up to the root leave. A path of the host that a container does not see counts from the
// first visible parent.
uint64_t CgroupAvailable(const std::string& root, const CgroupFiles& files, std::string path) {
  uint64_t available = std::numeric_limits<uint64_t>::max();
  for (;;) {
    const std::string directory = root + files.mount + path + "/";
    const std::optional<uint64_t> limit = ReadNumber(directory + files.limit);
    const std::optional<uint64_t> usage = ReadNumber(directory + files.usage);
    if (limit && usage) {
      const Result<std::string> stat = ReadFile(directory + "memory.stat", kFactFileBytesMax);
      const uint64_t reclaimable = stat ? FindField(*stat, files.reclaimable_key).value_or(0) : 0;
      const uint64_t used = *usage - std::min(*usage, reclaimable);
      available = std::min(available, *limit - std::min(*limit, used));
    }
    if (path.empty()) return available;
    path.resize(path.rfind('/'));
  }
}

}  // namespace

Result<Id128> BootId() {
  SP_ASSIGN_OR_RETURN(std::string text, ReadFile("/proc/sys/kernel/random/boot_id", 64));
  std::erase_if(text, [](char c) { return c == '-' || c == '\n'; });
  Id128 id;
  if (!Id128::FromHex(text, &id)) return Error(StatusCode::kInternal, "boot id '" + text + "' is not 128 bits of hex");
  return id;
}

Result<uint64_t> AvailableMemoryBytes(const std::string& root) {
  SP_ASSIGN_OR_RETURN(const std::string meminfo, ReadFile(root + "/proc/meminfo", kFactFileBytesMax));
  const std::optional<uint64_t> kib = FindField(meminfo, "MemAvailable:");
  if (!kib) return Error(StatusCode::kInternal, "/proc/meminfo has no MemAvailable");
  uint64_t available = *kib * 1024;

  // Lines "id:controllers:/path"; id 0 with no controllers is version 2. Without the file there are no cgroups.
  const std::string cgroups = ReadFile(root + "/proc/self/cgroup", kFactFileBytesMax).value_or("");
  for (size_t at = 0; at < cgroups.size();) {
    const size_t end = std::min(cgroups.find('\n', at), cgroups.size());
    const std::string line = cgroups.substr(at, end - at);
    at = end + 1;
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos || line[second + 1] != '/') continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers == ",,") available = std::min(available, CgroupAvailable(root, kVersion2, path));
    if (controllers.find(",memory,") != std::string::npos) {
      available = std::min(available, CgroupAvailable(root, kVersion1, path));
    }
  }
  return available;
}

void YieldToOthers() {
  constexpr int kIoprioWhoProcess = 1, kIoprioBestEffortLowest = 2 << 13 | 7;  // linux/ioprio.h, which C++ programs cannot include everywhere.
  // On Linux both calls mean the thread, where they say process.
  ::setpriority(PRIO_PROCESS, 0, 19);
  ::syscall(SYS_ioprio_set, kIoprioWhoProcess, 0, kIoprioBestEffortLowest);
}

void FillRandom(MutableByteSpan out) {
  while (!out.empty()) {
    const ssize_t got = RetryOnEintr([&] { return ::getrandom(out.data(), out.size(), 0); });
    SP_CHECK(got > 0);
    out = out.subspan(static_cast<size_t>(got));
  }
}

Id128 RandomId128() {
  Id128 id;
  FillRandom(id.bytes);
  return id;
}

}  // namespace sp
