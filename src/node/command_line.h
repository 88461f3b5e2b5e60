// From argv, environment and configuration file to what the program shall do.
#pragma once

#include <string>
#include <vector>

#include "base/bytes.h"
#include "node/settings.h"

namespace sp {

struct CommandLine {
  enum class Verb { kKeeper, kWorker, kPrintSettings, kText } verb = Verb::kKeeper;
  Settings settings;
  Id128 node, boot;  // kWorker: who its keeper is (--of-node, --of-boot).
  std::string text;  // kPrintSettings, kText (help, version): what to print.
};

// `args`: without argv[0]. `environment`: "NAME=value". Flag beats environment beats file beats default. A worker gets all its settings as flags
// from its keeper and reads nothing else. kInvalidArgument names what is wrong, unknown keys and SAFEPOINTD_* variables included.
Result<CommandLine> ParseCommandLine(const std::vector<std::string>& args, const std::vector<std::string>& environment, AvailableBytes available);

// The values in a TOML text; `path` is for messages.
Result<GivenValues> ParseSettingsToml(const std::string& toml, const std::string& path);

std::string VersionText();  // "0.1.0"

}  // namespace sp
