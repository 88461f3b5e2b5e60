#include "node/settings.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "durable/store_url.h"
#include "node/command_line.h"
#include "node/units.h"

namespace sp {
namespace {

constexpr uint64_t kAvailable = uint64_t{64} << 30;

std::string ErrorOf(const std::vector<std::string>& args, const std::vector<std::string>& environment = {}, AvailableBytes available = kAvailable) {
  const auto result = ParseCommandLine(args, environment, available);
  return result ? "accepted" : result.error().message();
}

Settings MustParse(const std::vector<std::string>& args, const std::vector<std::string>& environment = {}) {
  const auto result = ParseCommandLine(args, environment, kAvailable);
  EXPECT_TRUE(result) << (result ? "" : result.error().message());
  return result ? result->settings : Settings{};
}

class TomlFile {
 public:
  explicit TomlFile(const std::string& text) : path_(testing::TempDir() + "settings_test_" + std::to_string(counter_++) + ".toml") {
    std::ofstream(path_) << text;
  }
  ~TomlFile() { std::filesystem::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  static inline int counter_ = 0;
  std::string path_;
};

TEST(Units, SizesAndDurationsRoundTrip) {
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{1}, uint64_t{1023}, uint64_t{1} << 10, uint64_t{3} << 20, uint64_t{5} << 40, ~uint64_t{0}}) {
    EXPECT_EQ(ParseSize(FormatSize(bytes)), bytes);
  }
  for (const Nanos duration : {Nanos{0}, 250 * kNanosPerMilli, 90 * kNanosPerSecond, 7200 * kNanosPerSecond}) {
    EXPECT_EQ(ParseDuration(FormatDuration(duration)), duration);
  }
  EXPECT_EQ(ParseSize("64MiB"), uint64_t{64} << 20);
  EXPECT_EQ(ParseDuration("5min"), 300 * kNanosPerSecond);
}

// I-41.
TEST(StoreUrl, CredentialsInAUrlAreNotRepeated) {
  for (const char* url : {"http://KEY:SECRET@host/b", "s3://KEY:SECRET@bucket/x", "file://KEY:SECRET@host/x", "s3://bucket/x?secret=SECRET", "gs://SECRET@b"}) {
    const auto resolved = ResolveStoreUrl(url);
    ASSERT_FALSE(resolved) << url;
    EXPECT_EQ(resolved.error().message().find("SECRET"), std::string::npos) << resolved.error().message();
    const std::string setting = ErrorOf({std::string("--store=") + url});
    EXPECT_EQ(setting.find("SECRET"), std::string::npos) << setting;
  }
  EXPECT_EQ(ShownUrl("/mnt/store"), "/mnt/store");
}

TEST(Units, RefusesWhatCouldBeMisread) {
  for (const char* text : {"", "10 GB", "10GB", "1e99", "-1", "+1", "1.5GiB", " 1", "1 ", "0x10", "18446744073709551616", "16777216TiB", "GiB", "1gib", "１"}) {
    EXPECT_FALSE(ParseSize(text)) << text;
  }
  for (const char* text : {"", "5", "5 s", "-5s", "1.5s", "5m", "5S", "s", "1e3s", "9999999999999h"}) EXPECT_FALSE(ParseDuration(text)) << text;
}

TEST(Settings, I36_BadValuesAreNamedWithSourceAndRange) {
  const struct {
    const char *flag, *name, *problem;
  } kCases[] = {
      {"--pool=10 GB", "pool", "not a size"},
      {"--pool=1e99", "pool", "not a size"},
      {"--pool=0", "pool", "out of range"},
      {"--pool=100MiB", "pool", "not a multiple of extent"},
      {"--pool=999TiB", "pool", "out of range"},
      {"--pool=65GiB", "pool", "only 68719476736 are available"},
      {"--extent=3MiB", "extent", "not a power of two"},
      {"--extent=512KiB", "extent", "out of range"},
      {"--extent=2GiB", "extent", "out of range"},
      {"--pool-prefault=65MiB", "pool_prefault", "not a multiple of extent"},
      {"--pool-prefault=63GiB", "pool_prefault", "more than pool"},
      {"--retain=0", "retain", "out of range"},
      {"--retain=1001", "retain", "out of range"},
      {"--retain-max=1", "retain_max", "is less than retain (2)"},
      {"--retain=two", "retain", "not a whole number"},
      {"--lease=60", "lease", "not a duration"},
      {"--lease=0s", "lease", "out of range"},
      {"--lease=2h", "lease", "out of range"},
      {"--pin=2h", "pin", "out of range"},
      {"--grace=0", "grace", "out of range"},
      {"--idle-exit=10ms", "idle_exit", "out of range"},
      {"--ledger=1500KiB", "ledger", "not a multiple of 1MiB"},
      {"--ledger=1TiB", "ledger", "out of range"},
      {"--header-max=1023KiB", "header_max", "out of range"},
      {"--header-max=257MiB", "header_max", "out of range"},
      {"--socket=relative.sock", "socket", "not an absolute path"},
      {"--socket=/run/../etc/s", "socket", "contains \"..\""},
      {"--state-dir=/a/..", "state_dir", "contains \"..\""},
      {"--socket=/t\xff\xff.sock", "socket", "UTF-8"},
      {"--socket=/\xc0\xaf", "socket", "UTF-8"},
      {"--socket=/\xed\xa0\x80", "socket", "UTF-8"},
      {"--socket=/t\xc3", "socket", "UTF-8"},
      {"--socket-mode=666", "socket_mode", "octal"},
      {"--socket-mode=0066", "socket_mode", "owner"},
      {"--socket-mode=0999", "socket_mode", "octal"},
      {"--http=9202", "http", "numeric address"},
      {"--http=localhost:9202", "http", "numeric address"},
      {"--http=127.0.0.1:99999", "http", "numeric address"},
      {"--http=0.0.0.0:9202", "http", "not a loopback"},
      {"--http=[::]:9202", "http", "not a loopback"},
      {"--log-level=loud", "log_level", "not one of"},
      {"--log-file=daemon.log", "log_file", "absolute"},
      {"--lock-memory=yes", "lock_memory", "not one of"},
      {"--private=perhaps", "private", ""},
      {"--connections-max=0", "connections_max", "out of range"},
      {"--connections-max=100000", "connections_max", "out of range"},
      {"--connections-per-uid-max=5000", "connections_per_uid_max", "more than connections_max"},
      {"--check-threads=17", "check_threads", "out of range"},
  };
  for (const auto& c : kCases) {
    const std::string message = ErrorOf({c.flag});
    EXPECT_NE(message.find(c.name), std::string::npos) << c.flag << ": " << message;
    EXPECT_NE(message.find(c.problem), std::string::npos) << c.flag << ": " << message;
    EXPECT_NE(message, "accepted") << c.flag;
    if (*c.problem) {
      EXPECT_NE(message.find(" (--"), std::string::npos) << "no source: " << message;
      EXPECT_NE(message.find("Allowed: "), std::string::npos) << "no range: " << message;
    }
  }
}

TEST(Settings, I36_UnknownNamesAreRefused) {
  EXPECT_NE(ErrorOf({"--pol=1GiB"}).find("--pol"), std::string::npos);
  EXPECT_NE(ErrorOf({"surprise"}).find("surprise"), std::string::npos);
  EXPECT_NE(ErrorOf({}, {"SAFEPOINTD_POL=1GiB"}).find("SAFEPOINTD_POL"), std::string::npos);
  EXPECT_EQ(ErrorOf({}, {"SAFEPOINT_POL=1GiB", "PATH=/bin"}), "accepted");
  const TomlFile unknown("pool = \"1GiB\"\npol = 3\n");
  EXPECT_NE(ErrorOf({"--config", unknown.path()}).find(unknown.path() + ":2: \"pol\""), std::string::npos);
  const TomlFile section("[pool]\nsize = 3\n");
  EXPECT_NE(ErrorOf({"--config", section.path()}).find("must be a string"), std::string::npos);
  const TomlFile twice("pool = \"1GiB\"\npool = \"2GiB\"\n");
  EXPECT_NE(ErrorOf({"--config", twice.path()}).find(twice.path() + ":2"), std::string::npos);
  EXPECT_NE(ErrorOf({"--pool=1GiB", "--pool=2GiB"}), "accepted");
  EXPECT_NE(ErrorOf({"--config", "/nowhere/at/all.toml"}).find("/nowhere/at/all.toml"), std::string::npos);
}

// toml++ 3.3 runs into undefined behaviour on some characters beyond ASCII, wherever it takes them for something else than text (U+045D, U+1681, ...).
TEST(Settings, I36_CharactersBeyondAsciiAreTextOrRefused) {
  for (const char* foreign : {"\u045d", "\u1681", "\u180e", "\u2000", "\u3000", "\ufeff", "\U0001f600"}) {
    const std::string c = foreign;
    const TomlFile text("# " + c + " 100%25\nstate_dir = \"/var/" + c + "%41/" + c + "\"\nlog_file = '/var/" + c + "%' # " + c + "\n");
    const Settings settings = MustParse({"--config", text.path()});
    EXPECT_EQ(settings.state_dir, "/var/" + c + "%41/" + c);
    EXPECT_EQ(settings.log_file, "/var/" + c + "%");
    for (const std::string& bad : {c + " = 3\n", "retain = " + c + "\n", "retain = -s" + c + "\\c\n", "retain = 3 " + c + "\n", "private = -s\"" + c + "\\c\n",
                                   "re" + c + "tain = 3\n", "[" + c + "]\n"}) {
      const TomlFile file("pool = \"1GiB\"\n" + bad);
      EXPECT_NE(ErrorOf({"--config", file.path()}).find(file.path() + ":"), std::string::npos) << bad;
    }
  }
  const TomlFile no_text("state_dir = \"/\xff\"\n");
  EXPECT_NE(ErrorOf({"--config", no_text.path()}).find("not valid UTF-8"), std::string::npos);
  const TomlFile by_number("# \u045d\nstate_dir = \"/\\u0025FF\"\n");
  EXPECT_NE(ErrorOf({"--config", by_number.path()}).find("write % itself"), std::string::npos);
  const TomlFile ascii("state_dir = \"/\\u0025FF/%41\"\n");
  EXPECT_EQ(MustParse({"--config", ascii.path()}).state_dir, "/%FF/%41");
}

TEST(Settings, TomlTypesMustFit) {
  for (const char* text : {"pool = 1.5", "pool = true", "retain = \"3\"", "lease = 60", "private = 1", "private = \"true\"", "socket_mode = 0o600", "http = 1",
                           "pool = [1]", "pool = 2020-01-01"}) {
    const TomlFile file(text);
    const std::string message = ErrorOf({"--config", file.path()});
    EXPECT_NE(message.find("must be "), std::string::npos) << text << ": " << message;
  }
  const TomlFile negative("pool = -1");
  EXPECT_NE(ErrorOf({"--config", negative.path()}).find("not a size"), std::string::npos);
}

TEST(Settings, I36_AMalformedTableHeaderIsRefusedAndNoAssertionOfTheParserFails) {
  for (const char* text : {"[[[[[[\n", "[[[", "[=]", "[a.]", "[[a]b]", "a.=1", "=1", "[ ", "a = [[[[", "a = {=}", "Ts\xc7\xa8\xd8\x8ft = 1"}) {
    const TomlFile file(text);
    EXPECT_NE(ErrorOf({"--config", file.path()}).find(file.path()), std::string::npos) << text;
  }
}

TEST(Settings, FlagBeatsEnvironmentBeatsFileBeatsDefault) {
  const TomlFile file("retain = 3\nlease = \"70s\"\npool = \"1GiB\"\nprivate = false\n");
  const std::vector<std::string> environment = {"SAFEPOINTD_CONFIG=" + file.path(), "SAFEPOINTD_RETAIN=4", "SAFEPOINTD_LEASE=80s"};
  const Settings settings = MustParse({"--retain=5"}, environment);
  EXPECT_EQ(settings.retain, 5u);
  EXPECT_EQ(settings.lease, 80 * kNanosPerSecond);
  EXPECT_EQ(settings.pool_bytes, uint64_t{1} << 30);
  EXPECT_EQ(settings.pin, 600 * kNanosPerSecond);
  // The source in a message is the one that won.
  EXPECT_NE(ErrorOf({"--retain=5"}, {"SAFEPOINTD_CONFIG=" + file.path(), "SAFEPOINTD_LEASE=8"}).find("SAFEPOINTD_LEASE"), std::string::npos);
}

TEST(Settings, DefaultsFollowTheMemoryThatIsThere) {
  const Settings plain = MustParse({});
  EXPECT_EQ(plain.pool_bytes, kAvailable / 2);
  EXPECT_EQ(plain.pool_prefault_bytes, plain.pool_bytes);
  EXPECT_EQ(plain.extent_bytes, 64u << 20);
  const Settings large = MakeSettings({}, uint64_t{4} << 40).value();
  EXPECT_EQ(large.pool_bytes, uint64_t{2} << 40);
  EXPECT_LE(large.extents_max(), 4096u);
  EXPECT_EQ(large.extent_bytes, 512u << 20);
  const Settings own = MustParse({"--private", "--socket=/tmp/x.sock", "--state-dir=/tmp/x"});
  EXPECT_TRUE(own.is_private);
  EXPECT_EQ(own.pool_prefault_bytes, 0u);
  EXPECT_EQ(own.ledger_bytes, 8u << 20);
  EXPECT_EQ(own.header_max, 256u << 20);
  EXPECT_EQ(MustParse({"--pool=1GiB"}).header_max, 16u << 20);
  EXPECT_EQ(MustParse({"--private", "--socket=/tmp/x.sock", "--state-dir=/tmp/x", "--header-max=1MiB"}).header_max, 1u << 20);
  EXPECT_EQ(own.extent_bytes, 16u << 20);
  EXPECT_EQ(own.socket_mode, 0600u);
  EXPECT_EQ(own.http, "off");
  EXPECT_EQ(own.idle_exit, 300 * kNanosPerSecond);
  EXPECT_EQ(own.idle_exit_holding, 86400 * kNanosPerSecond);
  const GivenValues private_one = {{"private", {"true", ""}}, {"socket", {"/tmp/x.sock", ""}}, {"state_dir", {"/tmp/x", ""}}};
  const Settings large_own = MakeSettings(private_one, uint64_t{1} << 40).value();
  EXPECT_EQ(large_own.pool_bytes, uint64_t{512} << 30);  // Half of it, however large: the extents grow with it.
  EXPECT_EQ(large_own.extent_bytes, 128u << 20);
  EXPECT_NE(ErrorOf({"--private"}).find("setting socket"), std::string::npos);
}

TEST(Settings, F48_MoreMemoryThanThereIsIsRefusedWithTheNumbers) {
  const std::string message = ErrorOf({"--pool=1GiB"}, {}, uint64_t{1} << 30);
  EXPECT_NE(message.find("only 1073741824 are available"), std::string::npos) << message;
  EXPECT_NE(ErrorOf({}, {}, uint64_t{100} << 20).find("does not hold one extent"), std::string::npos);
  EXPECT_NE(ErrorOf({}, {}, std::nullopt).find("must be given"), std::string::npos);
  EXPECT_EQ(ErrorOf({"--pool=1GiB"}, {}, std::nullopt), "accepted");
}

TEST(Settings, PrintedSettingsReadBackTheSame) {
  const auto first = ParseCommandLine({"--print-settings", "--pool=3GiB", "--retain=7", "--lease=1500ms", "--socket=/tmp/a\"b\\c", "--private", "--state-dir=/tmp/d",
                                       "--socket-mode=0660", "--http=[::1]:0"},
                                      {}, kAvailable);
  ASSERT_TRUE(first) << first.error().message();
  EXPECT_EQ(first->verb, CommandLine::Verb::kPrintSettings);
  const TomlFile file(first->text);
  EXPECT_EQ(MustParse({"--config", file.path()}), first->settings) << first->text;
}

TEST(Settings, WorkerGetsTheKeepersSettingsAndReadsNothingElse) {
  const Settings settings = MustParse({"--pool=3GiB", "--pool-prefault=1GiB", "--private", "--socket=/tmp/x y", "--state-dir=/tmp/d", "--idle-exit=0"});
  const std::string id(32, 'a');
  std::vector<std::string> args = {"worker", "--of-node", id, "--of-boot", id};
  for (const std::string& flag : SettingsToFlags(settings)) args.push_back(flag);
  // Neither the environment nor a lack of memory (the keeper has it) changes anything.
  const auto worker = ParseCommandLine(args, {"SAFEPOINTD_RETAIN=9", "SAFEPOINTD_NONSENSE=1"}, 0);
  ASSERT_TRUE(worker) << worker.error().message();
  EXPECT_EQ(worker->verb, CommandLine::Verb::kWorker);
  EXPECT_EQ(worker->settings, settings);
  EXPECT_EQ(worker->boot.ToHex(), id);
  EXPECT_NE(ErrorOf({"--of-boot", id}), "accepted");  // Not for the keeper.
  args[2] = "short";
  EXPECT_NE(ErrorOf(args).find("--of-node"), std::string::npos);
}

TEST(CommandLine, HelpAndVersion) {
  const auto help = ParseCommandLine({"--help"}, {}, kAvailable);
  ASSERT_TRUE(help);
  for (const SettingInfo& info : ListSettings()) EXPECT_FALSE(info.help.empty()) << info.name;
  EXPECT_NE(help->text.find("--state-dir"), std::string::npos);
  const auto version = ParseCommandLine({"--version"}, {}, kAvailable);
  ASSERT_TRUE(version);
  EXPECT_EQ(version->text, "safepointd " + VersionText() + "\n");
}

}  // namespace
}  // namespace sp
