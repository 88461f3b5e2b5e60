// Settings from flags, environment and TOML (T-7). Properties: what is refused is refused with a reason; what is accepted reads back the same from
// the printed TOML and from the worker's flags.
//
// Input: fields that end with a zero byte. 'E' begins a variable, 'M' the memory that is there (a power of two), 'T' the TOML file, which is all that
// follows; every other field is an argument.
#include "node/settings.h"

#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "node/command_line.h"

namespace {

using namespace sp;

// A file with this content that no name in the file system leads to.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view content) : fd_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    SP_CHECK(fd_ >= 0);
    SP_CHECK(::write(fd_, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
  }
  ~MemoryFile() { ::close(fd_); }
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

void CheckSame(const Settings& settings, AvailableBytes available) {
  const std::string toml = SettingsToToml(settings, {});
  const auto values = ParseSettingsToml(toml, "printed");
  SP_CHECK(values.has_value());
  SP_CHECK(MakeSettings(*values, available) == settings);
  std::vector<std::string> args = {"worker", "--of-node", std::string(32, 'a'), "--of-boot", std::string(32, 'b')};
  for (const std::string& flag : SettingsToFlags(settings)) args.push_back(flag);
  const auto worker = ParseCommandLine(args, {}, 0);
  SP_CHECK(worker && worker->settings == settings);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  std::vector<std::string> args, environment;
  AvailableBytes available = uint64_t{64} << 30;
  std::optional<MemoryFile> toml;
  while (!text.empty()) {
    if (text[0] == 'T') {
      toml.emplace(text.substr(1));
      break;
    }
    const std::string field(text.substr(0, text.find('\0')));
    text.remove_prefix(std::min(field.size() + 1, text.size()));
    if (field.starts_with("E")) environment.push_back(field.substr(1));
    else if (field.starts_with("M")) available = field.size() == 1 ? AvailableBytes() : uint64_t{1} << (field[1] & 63);
    else args.push_back(field);
    // A target that opens whatever file its input names would not do the same thing twice.
    if (field.starts_with("--config") || field.starts_with("ESAFEPOINTD_CONFIG")) return 0;
  }
  if (toml && size % 2 == 0) args.push_back("--config=" + toml->path());
  else if (toml) environment.push_back("SAFEPOINTD_CONFIG=" + toml->path());
  const auto result = ParseCommandLine(args, environment, available);
  if (!result) {
    SP_CHECK(result.error().code() == StatusCode::kInvalidArgument && !result.error().message().empty());
    return 0;
  }
  switch (result->verb) {
    case CommandLine::Verb::kText: SP_CHECK(!result->text.empty()); break;
    case CommandLine::Verb::kPrintSettings: SP_CHECK(ParseSettingsToml(result->text, "printed").has_value()); [[fallthrough]];
    case CommandLine::Verb::kKeeper: CheckSame(result->settings, available); break;
    case CommandLine::Verb::kWorker: CheckSame(result->settings, std::nullopt); break;
  }
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  std::vector<Input> seeds;
  const auto add = [&](std::vector<std::string> fields) {
    std::string text;
    for (const std::string& field : fields) text += field + (field.starts_with("T") ? "" : std::string(1, '\0'));
    seeds.push_back(AsInput(text));
  };
  add({});
  add({"--help"});
  add({"--version"});
  add({"nonsense"});
  add({"keeper", "--print-settings", "--pool=3GiB", "--retain=7", "--lease=1500ms", "--socket=/tmp/a\"b\\c", "--socket-mode=0660", "--http=[::1]:0"});
  add({"--private", "--socket=/tmp/x.sock", "--state-dir=/tmp/x", "--idle-exit=0", "--idle-exit-holding=24h", "--lock-memory=off"});
  add({"--private=perhaps"});
  add({"worker", "--of-node", std::string(32, 'a'), "--of-boot", std::string(32, 'b'), "--pool=1GiB", "--extent=1MiB", "--pool-prefault=0"});
  add({"worker", "--of-node", "short", "--of-boot", std::string(32, 'b')});
  add({"ESAFEPOINTD_POOL=10 GB"});
  add({"ESAFEPOINTD_POOL=1e99"});
  add({"ESAFEPOINTD_POOL=18446744073709551615", "ESAFEPOINTD_POL=1"});
  add({"ESAFEPOINTD_RETAIN=0"});
  add({"ESAFEPOINTD_RETAIN"});
  add({"EPATH=/bin", "ESAFEPOINTD_LEASE=99999999999999999999h"});
  add({"--socket=/run/../etc/s", "--state-dir=/a/.."});
  add({"--log-file=/var/log/x", "--log-level=debug", "--log-lines-per-uid=1", "--check-threads=16", "--http=off"});
  add({"--connections-max=1", "--connections-per-uid-max=2"});
  add({"M", "--pool=1GiB"});
  add({"M\x1a"});
  add({"M\x3f", "--extent=1GiB"});
  add({"Tretain = 3\nlease = \"70s\"\npool = \"1GiB\"\nprivate = false\n"});
  add({"Tpool = 1073741824 # bytes\nextent = 0x100000\n"});
  add({"Tpool = -1\n"});
  add({"Tpool = \"1GiB\"\npool = \"2GiB\"\n"});
  add({"T[pool]\nsize = 3\n"});
  add({"Tsocket = \"\\u0000\\n\"\n"});
  add({"Tretain = 1.5\nprivate = 1\nlease = 60\nhttp = [1, {a = 2020-01-01T00:00:00Z}]\n"});
  add({"Tpol = 3\n"});
  add({"T[[[[[[\n"});
  // One field each: the first problem ends the reading.
  for (const char* flag :
       {"--pool=100MiB", "--pool=999TiB", "--pool=65GiB", "--pool=16384GiB", "--pool=1KiB", "--pool=99999999999TiB", "--extent=3MiB", "--extent=512KiB",
        "--pool-prefault=65MiB", "--pool-prefault=63GiB", "--retain=1001", "--retain=two", "--retain=", "--retain=999999999999999999999",
        "--retain=99999999999999999999", "--lease=60", "--lease=0s", "--lease=2h", "--lease=90min", "--lease=1h", "--lease=s", "--idle-exit=10ms",
        "--ledger=1500KiB", "--ledger=1025KiB", "--socket=relative.sock", "--socket=", "--socket-mode=666", "--socket-mode=0066", "--socket-mode=0999",
        "--socket-mode=1666", "--http=9202", "--http=localhost:9202", "--http=127.0.0.1:99999", "--http=127.0.0.1:x", "--http=0.0.0.0:9202",
        "--http=[::]:9202", "--http=[::1]:1", "--http=[x]:1", "--http=::1:1", "--http=x]:1", "--http=[:1", "--http=:1", "--log-level=loud", "--log-file=stderr",
        "--log-file=daemon.log", "--private", "--connections-max=0", "--connections-per-uid-max=5000"}) {
    add({flag});
  }
  add({"--socket=/" + std::string(5000, 'a')});
  add({"--socket=/" + std::string(300, 'a')});
  add({"--socket=/a\x01"});
  add({"--socket=/a\x7f"});
  add({"--extent=1MiB", "--pool=5GiB"});
  add({"M\x2c"});
  add({"M\x28", "--pool=3TiB", "--extent=1GiB"});
  add({"--private", "--socket=/tmp/x.sock"});
  add({"--private", "--socket=/tmp/x.sock", "--state-dir=/tmp/x", "--socket-mode=0600", "--ledger=1MiB", "--http=off", "--connections-max=256",
       "--pool-prefault=0", "--idle-exit-holding=1h"});
  add({"--retain=5", "ESAFEPOINTD_RETAIN=4", "Tretain = 3\n"});
  return seeds;
}
