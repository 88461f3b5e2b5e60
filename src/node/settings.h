// What an operator can choose, parsed once at start from flags, environment and a TOML file (docs/operating/settings.md).
//
// Nothing is clamped: a value that cannot be used is refused with its name, where it came from and what is allowed (I-36). The keeper hands the
// effective values to each worker as flags, so that an edited file or environment never makes a worker that contradicts its keeper.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "node/keeper_extents.h"

namespace sp {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError };

struct Settings {
  std::string socket = "/run/safepoint/safepointd.sock";
  uint32_t socket_mode = 0666;  // Who may connect is decided by the directory; who sees what, by the peer's uid.
  std::string state_dir = "/var/lib/safepoint";
  uint64_t pool_bytes = 0, pool_prefault_bytes = 0;  // At most; created at start.
  uint64_t extent_bytes = 64u << 20;
  uint64_t ledger_bytes = 32u << 20;
  LockMemory lock_memory = LockMemory::kBestEffort;

  uint32_t retain = 2;  // Complete steps kept per namespace.
  uint64_t retain_every = 0;  // And those that are a multiple of it; 0: none.
  Nanos retain_for = 0;       // And those that became complete less than so long before the newest; 0: none.
  uint32_t retain_max = 0;    // So many in all, at most. 0 until ApplyDefaults.
  Nanos lease = 60 * kNanosPerSecond;
  Nanos pin = 600 * kNanosPerSecond;
  Nanos handshake = 5 * kNanosPerSecond;
  Nanos grace = 10 * kNanosPerSecond;  // From SIGTERM to SIGKILL; the worker has half of it to finish its replies.

  std::string store = "off";  // URL of the durable tier.
  uint64_t durable_every = 0;
  Nanos durable_interval = 0;
  uint32_t durable_keep_last = 0;  // What goes from the store: durable/retention.h.
  uint64_t durable_keep_every = 0;
  Nanos durable_keep_for = 0;
  uint32_t drain_threads = 2;  // Shards on their way to the store at once.
  uint64_t drain_rate = 0;     // Bytes per second, of all of them; 0: no limit.

  bool is_private = false;
  Nanos idle_exit = 0, idle_exit_holding = 0;  // 0: never.

  uint32_t connections_max = 4096, connections_per_uid_max = 256;
  uint32_t open_attempts_max = 16, pins_max = 1024, namespaces_per_uid_max = 64;
  uint64_t header_max = 16u << 20;  // Of one shard.
  uint32_t check_threads = 2;  // Threads that read sealed memory back.

  std::string http = "127.0.0.1:9202";  // Or "off".
  LogLevel log_level = LogLevel::kInfo;
  std::string log_file = "stderr";
  uint32_t log_lines_per_uid = 10;  // Per second, after a burst of ten times as many.

  uint32_t extents_max() const { return static_cast<uint32_t>(pool_bytes / extent_bytes); }
  friend bool operator==(const Settings&, const Settings&) = default;
};

// One value as somebody wrote it, and where: "--pool", "SAFEPOINTD_POOL", "/etc/safepoint.toml: pool".
struct GivenValue {
  std::string text;
  std::string source;
};
using GivenValues = std::map<std::string, GivenValue>;  // By setting name.

// The memory that could be allocated now. nullopt: not known, or not to be compared (a worker: its keeper has the memory already).
using AvailableBytes = std::optional<uint64_t>;

// Defaults for what is not given, then every rule that one value or several must meet. kInvalidArgument names the first that does not.
Result<Settings> MakeSettings(const GivenValues& given, AvailableBytes available);

// The effective settings as TOML that reads back to the same settings; each line says where its value came from.
std::string SettingsToToml(const Settings& settings, const GivenValues& given);
// The same as flags, for the worker.
std::vector<std::string> SettingsToFlags(const Settings& settings);

// What the sources need to know about a setting.
struct SettingInfo {
  std::string name;   // As in TOML: "state_dir"; the flag is --state-dir, the variable SAFEPOINTD_STATE_DIR.
  std::string help;
  std::string range;  // What is allowed, for people.
  enum class Kind { kText, kCount, kSize, kBool } kind = Kind::kText;  // kCount may be a TOML integer, kSize integer or text.
};
std::vector<SettingInfo> ListSettings();

// As TOML and JSON want it: no overlong forms, no surrogates, nothing beyond U+10FFFF.
bool IsUtf8(const std::string& text);

// How every refused value is reported: name, value, source, problem, range.
Status SettingError(const std::string& name, const GivenValue& value, const std::string& problem);

}  // namespace sp
