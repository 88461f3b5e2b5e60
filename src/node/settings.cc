#include "node/settings.h"

#include <bit>
#include <functional>
#include <limits>

#include "durable/store_url.h"
#include "format/constants.h"
#include "node/listen_address.h"
#include "node/units.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr uint64_t kMiB = 1u << 20;
constexpr uint64_t kGiB = 1u << 30;
constexpr uint32_t kRetainMax = 1000;
constexpr uint32_t kSparedDefault = 4;  // Steps that retain_every and retain_for add, at most, where retain_max does not say.
constexpr Nanos kSecond = kNanosPerSecond;
constexpr Nanos kHour = 3600 * kSecond;
constexpr uint64_t kExtentDefault = 64 * kMiB;
constexpr uint64_t kExtentDefaultPrivate = 16 * kMiB;  // A private pool grows with what one user's job needs.

// One row of the table: everything about one setting that does not depend on the others.
struct Row {
  SettingInfo info;
  std::function<std::string(Settings&, const std::string&)> set;  // Returns what is wrong; empty: nothing.
  std::function<std::string(const Settings&)> text;               // `set` of this gives the same value back.
};

template <typename T>
Row Number(const char* name, T Settings::*member, uint64_t min, uint64_t max, const char* help) {
  const std::string range = std::to_string(min) + " to " + std::to_string(max);
  return {{name, help, range, SettingInfo::Kind::kCount},
          [=](Settings& s, const std::string& text) -> std::string {
            const auto value = ParseCount(text);
            if (!value) return "is not a whole number in plain digits";
            if (*value < min || *value > max) return "is out of range";
            s.*member = static_cast<T>(*value);
            return "";
          },
          [=](const Settings& s) { return std::to_string(s.*member); }};
}

Row Size(const char* name, uint64_t Settings::*member, uint64_t min, uint64_t max, const char* extra_range, const char* help) {
  const std::string range = FormatSize(min) + " to " + FormatSize(max) + extra_range;
  return {{name, help, range, SettingInfo::Kind::kSize},
          [=](Settings& s, const std::string& text) -> std::string {
            const auto value = ParseSize(text);
            if (!value) return "is not a size: write bytes, or a whole number of KiB, MiB, GiB or TiB without a blank, e.g. 10GiB";
            if (*value < min || *value > max) return "is out of range";
            s.*member = *value;
            return "";
          },
          [=](const Settings& s) { return FormatSize(s.*member); }};
}

Row Duration(const char* name, Nanos Settings::*member, Nanos min, Nanos max, bool zero_is_never, const char* help) {
  const std::string range = FormatDuration(min) + " to " + FormatDuration(max) + (zero_is_never ? ", or 0 for never" : "");
  return {{name, help, range, SettingInfo::Kind::kText},
          [=](Settings& s, const std::string& text) -> std::string {
            const auto value = ParseDuration(text);
            if (!value) return "is not a duration: write a whole number with its unit ms, s, min or h, e.g. 60s";
            if ((*value < min || *value > max) && !(zero_is_never && *value == 0)) return "is out of range";
            s.*member = *value;
            return "";
          },
          [=](const Settings& s) { return FormatDuration(s.*member); }};
}

template <typename E>
Row Choice(const char* name, E Settings::*member, std::vector<std::string> words, const char* help) {
  std::string range;
  for (const std::string& word : words) range += (range.empty() ? "" : " | ") + word;
  return {{name, help, range, SettingInfo::Kind::kText},
          [=](Settings& s, const std::string& text) -> std::string {
            for (size_t i = 0; i < words.size(); ++i) {
              if (text != words[i]) continue;
              s.*member = static_cast<E>(i);
              return "";
            }
            return "is not one of the words";
          },
          [=](const Settings& s) { return words[static_cast<size_t>(s.*member)]; }};
}

Row Bool(const char* name, bool Settings::*member, const char* help) {
  Row row = Choice(name, member, {"false", "true"}, help);
  row.info.kind = SettingInfo::Kind::kBool;
  return row;
}

std::string PathProblem(const std::string& path) {
  if (path.empty() || path[0] != '/') return "is not an absolute path";
  if (path.size() > 4000) return "is too long";
  for (const char c : path) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return "contains a control character";
  }
  if (!IsUtf8(path)) return "is not valid UTF-8, so the printed settings could not be read back";
  if ((path + "/").find("/../") != std::string::npos) return "contains \"..\"";
  return "";
}

Row Path(const char* name, std::string Settings::*member, const char* other_word, size_t bytes_max, const char* help) {
  std::string range = "an absolute path without \"..\", at most " + std::to_string(bytes_max) + " bytes";
  if (*other_word) range += std::string(", or \"") + other_word + "\"";
  return {{name, help, range, SettingInfo::Kind::kText},
          [=](Settings& s, const std::string& text) -> std::string {
            if (!*other_word || text != other_word) {
              if (std::string problem = PathProblem(text); !problem.empty()) return problem;
              if (text.size() > bytes_max) return "is too long";
            }
            s.*member = text;
            return "";
          },
          [=](const Settings& s) { return s.*member; }};
}

Row SocketMode() {
  return {{"socket_mode", "Permissions of the socket file.", "0600 to 0777 in octal, readable and writable for the owner", SettingInfo::Kind::kText},
          [](Settings& s, const std::string& text) -> std::string {
            if (text.size() != 4 || text[0] != '0' || text.find_first_not_of("01234567") != std::string::npos) {
              return "is not an octal mode of four digits";
            }
            const uint32_t mode = static_cast<uint32_t>((text[1] - '0') << 6 | (text[2] - '0') << 3 | (text[3] - '0'));
            if ((mode & 0600) != 0600) return "keeps the owner out";
            s.socket_mode = mode;
            return "";
          },
          [](const Settings& s) {
            std::string text = "0";
            for (const int shift : {6, 3, 0}) text.push_back(static_cast<char>('0' + (s.socket_mode >> shift & 7)));
            return text;
          }};
}

Row Store() {
  return {{"store", "Where steps become durable.", "file:///absolute/path, s3://bucket/prefix, or off; at most 1024 bytes", SettingInfo::Kind::kText},
          [](Settings& s, const std::string& text) -> std::string {
            if (text.size() > kStoreUrlBytesMax) return "is too long";
            if (text != "off") {
              if (const auto resolved = ResolveStoreUrl(text); !resolved) return resolved.error().message();
            }
            s.store = text;
            return "";
          },
          [](const Settings& s) { return s.store; }};
}

Row Http() {
  return {{"http", "Where /healthz, /metrics and /status are served.", "a loopback address and port, e.g. 127.0.0.1:9202 or [::1]:0 (0: any free port), or off",
           SettingInfo::Kind::kText},
          [](Settings& s, const std::string& text) -> std::string {
            if (text != "off") {
              const auto address = ParseListenAddress(text);
              if (!address) return address.error().message();
              if (!address->loopback) return "is not a loopback address; other networks need credentials, which this version does not have";
            }
            s.http = text;
            return "";
          },
          [](const Settings& s) { return s.http; }};
}

const std::vector<Row>& Table() {
  using S = Settings;
  static const std::vector<Row>& table = *new std::vector<Row>{
      Path("socket", &S::socket, "", kMaxSocketPathBytes, "The daemon's Unix socket."),
      SocketMode(),
      Path("state_dir", &S::state_dir, "", 4000, "Directory for the node's id and the markers of namespaces that once had a complete step."),
      Size("pool", &S::pool_bytes, kMiB, kExtentsMax * kGiB, ", a multiple of extent, at most 4096 extents", "Memory for checkpoints, at most."),
      Size("pool_prefault", &S::pool_prefault_bytes, 0, kExtentsMax * kGiB, ", a multiple of extent, at most pool",
           "Part of the pool that is created at start; the rest when it is needed."),
      Size("extent", &S::extent_bytes, kMiB, kGiB, ", a power of two", "Unit of the pool."),
      Size("ledger", &S::ledger_bytes, kMiB, kGiB, ", a multiple of 1MiB", "Memory for the log that a restarted worker reads."),
      Choice("lock_memory", &S::lock_memory, {"off", "best-effort", "required"}, "Keep the pool out of swap."),
      Number("retain", &S::retain, 1, kRetainMax, "Complete steps kept per namespace."),
      Number("retain_every", &S::retain_every, 0, kStepMax, "And steps that are a multiple of it, up to retain_max in all; 0: none."),
      Duration("retain_for", &S::retain_for, kSecond, 366 * 24 * kHour, true,
               "And steps that became complete less than so long before the newest, up to retain_max in all."),
      Number("retain_max", &S::retain_max, 1, kRetainMax, "Complete steps kept per namespace, with those that retain_every and retain_for add."),
      Duration("lease", &S::lease, kSecond, kHour, false, "A writer that is not heard of for so long loses its lease."),
      Duration("pin", &S::pin, kSecond, kHour, false, "A restore that is not heard of for so long loses its hold on the step."),
      Duration("handshake", &S::handshake, kSecond, 60 * kSecond, false, "A new connection must say Hello within this."),
      Duration("grace", &S::grace, 100 * kNanosPerMilli, 600 * kSecond, false, "From SIGTERM to the end, at most."),
      Store(),
      Number("durable_every", &S::durable_every, 0, kStepMax, "Every step that is a multiple of it is made durable; 0: those that are asked for."),
      Duration("durable_interval", &S::durable_interval, kSecond, 366 * 24 * kHour, true, "The first complete step after so long is made durable, too."),
      Number("durable_keep_last", &S::durable_keep_last, 0, 1'000'000, "Older steps are deleted from the store, but so many newest ones; 0: no such rule."),
      Number("durable_keep_every", &S::durable_keep_every, 0, kStepMax, "Steps that are a multiple of it are not deleted; 0: none for that."),
      Duration("durable_keep_for", &S::durable_keep_for, kSecond, 3660 * 24 * kHour, true,
               "Steps that were made so long before the newest are deleted, unless another rule keeps them."),
      Number("drain_threads", &S::drain_threads, 1, 16, "Shards that are on their way to the store at once."),
      Size("drain_rate", &S::drain_rate, 0, kExtentsMax * kGiB, "", "Bytes per second that go to the store, at most; 0: no limit."),
      Bool("private", &S::is_private, "Started by a client library for one user: grows on demand, ends when idle."),
      Duration("idle_exit", &S::idle_exit, kSecond, 366 * 24 * kHour, true, "End after so long without a client when no step is held."),
      Duration("idle_exit_holding", &S::idle_exit_holding, kSecond, 366 * 24 * kHour, true, "End after so long without a client although steps are held."),
      Number("connections_max", &S::connections_max, 1, 65536, "Connections at once."),
      Number("connections_per_uid_max", &S::connections_per_uid_max, 1, 65536, "Connections of one user at once."),
      Number("open_attempts_max", &S::open_attempts_max, 1, 4096, "Attempts being written at once, per namespace."),
      Number("pins_max", &S::pins_max, 1, 65536, "Restores at once, per namespace."),
      Number("namespaces_per_uid_max", &S::namespaces_per_uid_max, 1, 65536, "Namespaces of one user."),
      Size("header_max", &S::header_max, kMiB, kHeaderBytesMax, "", "The list of tensors in one shard, at most; parsing takes up to six times as much."),
      Number("check_threads", &S::check_threads, 1, 16, "Threads that read sealed memory back to check it."),
      Http(),
      Choice("log_level", &S::log_level, {"debug", "info", "warning", "error"}, "Least severity that is logged."),
      Path("log_file", &S::log_file, "stderr", 4000, "Where log lines are appended."),
      Number("log_lines_per_uid", &S::log_lines_per_uid, 1, 1'000'000, "Log lines per second that one user can cause; a burst of ten times as many passes."),
  };
  return table;
}

// What depends on other settings when nobody gave a value.
void ApplyDefaults(Settings& s, const GivenValues& given, AvailableBytes available) {
  const auto missing = [&](const char* name) { return !given.contains(name); };
  if (missing("retain_max")) s.retain_max = std::min<uint32_t>(s.retain + (s.retain_every > 0 || s.retain_for > 0 ? kSparedDefault : 0), kRetainMax);
  if (missing("extent")) {
    const uint64_t pool = missing("pool") ? available.value_or(0) / 2 : s.pool_bytes;
    s.extent_bytes = s.is_private ? kExtentDefaultPrivate : kExtentDefault;
    while (s.extent_bytes < kGiB && pool / s.extent_bytes > kExtentsMax) s.extent_bytes *= 2;
  }
  if (missing("pool")) {
    const uint64_t extents = std::min<uint64_t>(available.value_or(0) / 2 / s.extent_bytes, kExtentsMax);
    s.pool_bytes = extents * s.extent_bytes;
  }
  if (missing("pool_prefault")) s.pool_prefault_bytes = s.is_private ? 0 : s.pool_bytes;
  if (!s.is_private) return;
  if (missing("socket_mode")) s.socket_mode = 0600;
  if (missing("ledger")) s.ledger_bytes = 8 * kMiB;
  if (missing("http")) s.http = "off";
  if (missing("header_max")) s.header_max = kHeaderBytesMax;  // Its memory is its one user's own.
  if (missing("connections_max")) s.connections_max = std::max<uint32_t>(256, s.connections_per_uid_max);
  if (missing("idle_exit")) s.idle_exit = 300 * kSecond;
  if (missing("idle_exit_holding")) s.idle_exit_holding = 24 * kHour;
}

// Rules between settings; the first one that is broken.
Status CheckTogether(const Settings& s, const GivenValues& given, AvailableBytes available) {
  const auto wrong = [&](const char* name, const std::string& problem) {
    const auto it = given.find(name);
    if (it != given.end()) return SettingError(name, it->second, problem);
    for (const Row& row : Table()) {
      if (row.info.name == name) return SettingError(name, {row.text(s), "default"}, problem);
    }
    return Status(StatusCode::kInternal, std::string("no setting ") + name);
  };
  for (const char* name : {"socket", "state_dir"}) {
    if (s.is_private && !given.contains(name)) return wrong(name, "must be given together with private");
  }
  if (!std::has_single_bit(s.extent_bytes)) return wrong("extent", "is not a power of two");
  if (s.ledger_bytes % kMiB != 0) return wrong("ledger", "is not a multiple of 1MiB");
  if (!given.contains("pool") && !available) return wrong("pool", "must be given, because the available memory cannot be read");
  if (s.pool_bytes == 0) {
    return wrong("pool", "half of the available memory (" + FormatSize(available.value_or(0)) + ") does not hold one extent of " + FormatSize(s.extent_bytes));
  }
  if (s.pool_bytes % s.extent_bytes != 0) return wrong("pool", "is not a multiple of extent (" + FormatSize(s.extent_bytes) + ")");
  if (s.pool_bytes / s.extent_bytes > kExtentsMax) {
    return wrong("pool", "is more than " + std::to_string(kExtentsMax) + " extents of " + FormatSize(s.extent_bytes) + "; choose a larger extent");
  }
  if (s.pool_prefault_bytes % s.extent_bytes != 0) return wrong("pool_prefault", "is not a multiple of extent (" + FormatSize(s.extent_bytes) + ")");
  if (s.pool_prefault_bytes > s.pool_bytes) return wrong("pool_prefault", "is more than pool (" + FormatSize(s.pool_bytes) + ")");
  const std::pair<const char*, bool> need_a_store[] = {{"durable_every", s.durable_every > 0},
                                                       {"durable_interval", s.durable_interval > 0},
                                                       {"durable_keep_last", s.durable_keep_last > 0},
                                                       {"durable_keep_for", s.durable_keep_for > 0}};
  for (const auto& [name, set] : need_a_store) {
    if (set && s.store == "off") return wrong(name, "needs a store");
  }
  if (s.durable_keep_every > 0 && s.durable_keep_last == 0 && s.durable_keep_for == 0) {
    return wrong("durable_keep_every", "names exceptions, and nothing is deleted: set durable_keep_last or durable_keep_for, too");
  }
  if (s.retain_max < s.retain) return wrong("retain_max", "is less than retain (" + std::to_string(s.retain) + ")");
  if (s.connections_per_uid_max > s.connections_max) {
    return wrong("connections_per_uid_max", "is more than connections_max (" + std::to_string(s.connections_max) + ")");
  }
  // Refused now rather than met later as an out-of-memory kill (F48).
  if (available && s.pool_bytes + s.ledger_bytes > *available) {
    return wrong("pool", "with a ledger of " + std::to_string(s.ledger_bytes) + " bytes needs " + std::to_string(s.pool_bytes + s.ledger_bytes) + " bytes; only " +
                             std::to_string(*available) + " are available");
  }
  return {};
}

}  // namespace

bool IsUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto at = [&](size_t k) -> uint32_t { return k < text.size() ? static_cast<unsigned char>(text[k]) : 0; };
    const uint32_t lead = at(i);
    const size_t length = lead < 0x80 ? 1 : lead >> 5 == 0x6 ? 2 : lead >> 4 == 0xe ? 3 : lead >> 3 == 0x1e ? 4 : 0;
    if (length == 0) return false;
    uint32_t code = length == 1 ? lead : lead & (0x7fu >> length);
    for (size_t k = 1; k < length; ++k) {
      if (at(i + k) >> 6 != 2) return false;
      code = code << 6 | (at(i + k) & 0x3f);
    }
    static constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < kLeast[length] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    i += length;
  }
  return true;
}

Status SettingError(const std::string& name, const GivenValue& value, const std::string& problem) {
  std::string range;
  const std::string text = value.text.find("://") == std::string::npos ? value.text : ShownUrl(value.text);
  for (const Row& row : Table()) {
    if (row.info.name == name) range = row.info.range;
  }
  return Status(StatusCode::kInvalidArgument, "setting " + name + " = \"" + text + "\" (" + value.source + "): " + problem +
                                                  (range.empty() ? "" : ". Allowed: " + range));
}

std::vector<SettingInfo> ListSettings() {
  std::vector<SettingInfo> list;
  for (const Row& row : Table()) list.push_back(row.info);
  return list;
}

Result<Settings> MakeSettings(const GivenValues& given, AvailableBytes available) {
  Settings settings;
  for (const Row& row : Table()) {
    const auto it = given.find(row.info.name);
    if (it == given.end()) continue;
    if (std::string problem = row.set(settings, it->second.text); !problem.empty()) {
      return std::unexpected(SettingError(row.info.name, it->second, problem));
    }
  }
  ApplyDefaults(settings, given, available);
  SP_RETURN_IF_ERROR(CheckTogether(settings, given, available));
  return settings;
}

std::string SettingsToToml(const Settings& settings, const GivenValues& given) {
  std::string out;
  for (const Row& row : Table()) {
    const bool bare = row.info.kind == SettingInfo::Kind::kCount || row.info.kind == SettingInfo::Kind::kBool;
    std::string text = row.text(settings);
    if (!bare) {
      std::string quoted = "\"";
      for (const char c : text) {  // Control characters were refused; these two are what is left to escape.
        if (c == '"' || c == '\\') quoted.push_back('\\');
        quoted.push_back(c);
      }
      text = quoted + "\"";
    }
    const auto it = given.find(row.info.name);
    out += row.info.name + " = " + text + "  # " + (it == given.end() ? "default" : it->second.source) + "\n";
  }
  return out;
}

std::vector<std::string> SettingsToFlags(const Settings& settings) {
  std::vector<std::string> flags;
  for (const Row& row : Table()) {
    std::string name = row.info.name;
    for (char& c : name) {
      if (c == '_') c = '-';
    }
    flags.push_back("--" + name + "=" + row.text(settings));
  }
  return flags;
}

}  // namespace sp
