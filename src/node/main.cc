// safepointd: keeps checkpoints of training jobs in this node's memory.
//
// Started plainly it is the keeper, which holds the memory and runs "safepointd worker" as its child (docs/ARCHITECTURE.md, "Processes").
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <new>

#include "node/command_line.h"
#include "node/keeper.h"
#include "node/keeper_log.h"
#include "node/state_dir.h"
#include "node/worker.h"
#include "os/system.h"

namespace sp {
namespace {

int Complain(const Status& status) {
  std::fprintf(stderr, "safepointd: %s\n", status.message().c_str());
  return kExitConfig;
}

// From here on, everything that this process and its workers say on stderr goes to the file. Only its owner may read it: it names namespaces.
Status OpenLogFile(const std::string& path) {
  const mode_t old = umask(0077);
  std::FILE* file = std::freopen(path.c_str(), "a", stderr);
  umask(old);
  // Said on stdout, because there is no stderr any more.
  if (file == nullptr) {
    std::fprintf(stdout, "safepointd: setting log_file = \"%s\": cannot be opened for appending\n", path.c_str());
    return Status(StatusCode::kInvalidArgument, "setting log_file cannot be opened");
  }
  std::setvbuf(stderr, nullptr, _IONBF, 0);
  return {};
}

// The directory of the socket, when only that level is missing, e.g. /run/safepoint after a boot.
void MakeSocketDirectory(const Settings& settings) {
  const mode_t old = umask(settings.is_private ? 0077 : 0022);
  std::error_code error;
  std::filesystem::create_directory(std::filesystem::path(settings.socket).parent_path(), error);
  umask(old);
  if (error) KeeperLog("warn", "socket_directory_not_made", {{"cause", std::string_view(error.message())}});  // Opening the socket says what follows from it.
}

int RunAsKeeper(const Settings& settings) {
  if (settings.log_file != "stderr") {
    if (!OpenLogFile(settings.log_file).ok()) return kExitConfig;
  }
  MakeSocketDirectory(settings);
  Result<Id128> node = LoadOrMakeNodeId(settings.state_dir);
  if (!node) {
    // The memory path does not need the disk (F53); only that this is the same node as before cannot be told.
    KeeperLog("warn", "node_id_unknown", {{"cause", node.error()}});
    node = RandomId128();
  }
  KeeperConfig config;
  config.socket_path = settings.socket;
  config.socket_mode = settings.socket_mode;
  config.extent_bytes = settings.extent_bytes;
  config.extents_at_start = static_cast<uint32_t>(settings.pool_prefault_bytes / settings.extent_bytes);
  config.extents_max = settings.extents_max();
  config.ledger_bytes = settings.ledger_bytes;
  config.lock = settings.lock_memory;
  config.grace = std::chrono::milliseconds(settings.grace / kNanosPerMilli);
  // A new id each time: whoever sees it change knows that the memory of before is gone.
  config.worker_argv = {"safepointd", "worker", "--of-node=" + node->ToHex(), "--of-boot=" + RandomId128().ToHex()};
  for (std::string& flag : SettingsToFlags(settings)) config.worker_argv.push_back(std::move(flag));
  if (const Status valid = ValidateKeeperConfig(config); !valid.ok()) return Complain(valid);
  return RunKeeper(config);
}

int Main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) environment.emplace_back(*entry);
  const auto available = AvailableMemoryBytes();
  const auto command = ParseCommandLine(args, environment, available ? AvailableBytes(*available) : std::nullopt);
  if (!command) return Complain(command.error());
  switch (command->verb) {
    case CommandLine::Verb::kText:
    case CommandLine::Verb::kPrintSettings:
      std::fputs(command->text.c_str(), stdout);
      return std::fflush(stdout) == 0 ? 0 : kExitOs;
    case CommandLine::Verb::kWorker: return RunWorker(*command);
    case CommandLine::Verb::kKeeper: return RunAsKeeper(command->settings);
  }
  return kExitConfig;
}

}  // namespace
}  // namespace sp

int main(int argc, char** argv) {
  try {
    return sp::Main(argc, argv);
  } catch (const std::bad_alloc&) {
    // The keeper, when it starts: once it holds memory it bears that (KeeperLoop). A worker at any time: the keeper starts the next one.
    std::fputs("safepointd: out of memory\n", stderr);
    return sp::kExitOs;
  }
}
