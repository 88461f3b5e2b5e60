#include "node/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <sstream>
#include <stdexcept>

// toml++ 3.3 asserts things that a malformed file makes false ("[[[["), and in optimised builds assumes them: undefined behaviour on an operator's
// typing error. Here its assertions throw, in every build, and the file is refused.
#ifdef NDEBUG
#define SP_NDEBUG_BEFORE_TOML
#undef NDEBUG
#endif
static constexpr void RequireOfToml(bool holds) {
  if (!holds) throw std::logic_error("malformed");
}
#define TOML_ASSERT(expr) RequireOfToml(static_cast<bool>(expr))
#include <toml++/toml.h>
#ifdef SP_NDEBUG_BEFORE_TOML
#define NDEBUG
#endif

#include "os/files.h"

#ifndef SP_VERSION
#error "SP_VERSION comes from the build"
#endif

namespace sp {
namespace {

constexpr std::string_view kPrefix = "SAFEPOINTD_";
constexpr size_t kConfigBytesMax = 1u << 20;

std::string FlagName(std::string name) {
  for (char& c : name) c = c == '_' ? '-' : c;
  return "--" + name;
}

std::string VariableName(std::string name) {
  for (char& c : name) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  return std::string(kPrefix) + name;
}

Status Wrong(std::string message) { return Status(StatusCode::kInvalidArgument, std::move(message)); }

// Values from the environment; `config` is set when SAFEPOINTD_CONFIG is.
Result<GivenValues> FromEnvironment(const std::vector<std::string>& environment, std::string* config) {
  std::map<std::string, std::string> known;
  for (const SettingInfo& info : ListSettings()) known[VariableName(info.name)] = info.name;
  GivenValues values;
  for (const std::string& entry : environment) {
    if (!entry.starts_with(kPrefix)) continue;
    const size_t equals = entry.find('=');
    const std::string name = entry.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : entry.substr(equals + 1);
    if (name == VariableName("config")) {
      *config = value;
      continue;
    }
    const auto it = known.find(name);
    if (it == known.end()) return std::unexpected(Wrong("environment variable " + name + " is not a setting of safepointd"));
    values[it->second] = {value, name};
  }
  return values;
}

// The text of one TOML value as a flag would have it; nothing when its type does not fit the setting.
std::optional<std::string> TomlText(const toml::node& node, SettingInfo::Kind kind) {
  using Kind = SettingInfo::Kind;
  if (const auto* text = node.as_string(); text && (kind == Kind::kText || kind == Kind::kSize)) return text->get();
  if (const auto* number = node.as_integer(); number && (kind == Kind::kCount || kind == Kind::kSize)) return std::to_string(number->get());
  if (const auto* flag = node.as_boolean(); flag && kind == Kind::kBool) return flag->get() ? "true" : "false";
  return std::nullopt;
}

const char* TomlTypeWanted(SettingInfo::Kind kind) {
  switch (kind) {
    case SettingInfo::Kind::kText: return "a string in quotes";
    case SettingInfo::Kind::kCount: return "an integer";
    case SettingInfo::Kind::kSize: return "a string such as \"1GiB\", or an integer (bytes)";
    case SettingInfo::Kind::kBool: return "true or false";
  }
  return "something else";
}

// toml++ 3.3 classifies characters beyond ASCII by tables that end in undefined behaviour for some of them, so it never sees one: their bytes are written
// as "%XX" (and "%" as "%25"), which is legal where they are, in strings and comments, and put back into what comes out.
class ForeignBytes {
 public:
  explicit ForeignBytes(const std::string& text) : any_(std::ranges::any_of(text, [](char c) { return IsForeign(c); })) {}

  std::string Hide(const std::string& text) const {
    if (!any_) return text;
    std::string hidden;
    for (const char c : text) {
      if (!IsForeign(c) && c != '%') {
        hidden.push_back(c);
        continue;
      }
      const auto byte = static_cast<unsigned char>(c);
      hidden += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
    return hidden;
  }

  std::string Restore(std::string_view hidden) const {
    std::string text;
    for (size_t i = 0; i < hidden.size(); ++i) {
      const size_t high = any_ && hidden[i] == '%' && i + 2 < hidden.size() ? kHex.find(hidden[i + 1]) : std::string_view::npos;
      const size_t low = high != std::string_view::npos ? kHex.find(hidden[i + 2]) : std::string_view::npos;
      if (low == std::string_view::npos) {
        text.push_back(hidden[i]);
        continue;
      }
      text.push_back(static_cast<char>(high << 4 | low));
      i += 2;
    }
    return text;
  }

 private:
  static constexpr std::string_view kHex = "0123456789ABCDEF";
  static bool IsForeign(char c) { return static_cast<unsigned char>(c) >= 0x80; }
  bool any_;  // Otherwise nothing is touched.
};

std::string HelpText(const CLI::App& app) {
  return app.help() +
         "\nEach setting can also be given as an environment variable (--state-dir: SAFEPOINTD_STATE_DIR) or in the TOML file named by --config\n"
         "(state_dir = \"...\"). A flag beats the environment, which beats the file. See docs/operating/settings.md.\n";
}

}  // namespace

std::string VersionText() { return SP_VERSION; }

Result<GivenValues> ParseSettingsToml(const std::string& text, const std::string& path) {
  if (!IsUtf8(text)) return std::unexpected(Wrong(path + ": is not valid UTF-8"));
  const ForeignBytes foreign(text);
  toml::table table;
  try {
    table = toml::parse(foreign.Hide(text), path);
  } catch (const toml::parse_error& error) {
    std::ostringstream where;
    where << path << ":" << error.source().begin.line << ": " << foreign.Restore(error.description());
    return std::unexpected(Wrong(where.str()));
  } catch (const std::logic_error& error) {
    return std::unexpected(Wrong(path + ": " + error.what()));
  }
  std::map<std::string, SettingInfo::Kind, std::less<>> known;
  for (const SettingInfo& info : ListSettings()) known[info.name] = info.kind;
  GivenValues values;
  for (const auto& [key, node] : table) {
    const std::string name = foreign.Restore(key.str());
    const std::string source = path + ":" + std::to_string(node.source().begin.line);
    const auto it = known.find(name);
    if (it == known.end()) return std::unexpected(Wrong(source + ": \"" + name + "\" is not a setting of safepointd"));
    const auto value = TomlText(node, it->second);
    if (!value) {
      std::ostringstream shown;
      shown << toml::node_view<const toml::node>(node);
      return std::unexpected(SettingError(name, {foreign.Restore(shown.str()), source}, std::string("must be ") + TomlTypeWanted(it->second)));
    }
    const std::string restored = foreign.Restore(*value);
    // "\u0025" is the one way to write a "%" that was not hidden.
    if (!IsUtf8(restored)) return std::unexpected(SettingError(name, {restored, source}, "is not valid UTF-8: write % itself, not its number"));
    values[name] = {restored, source};
  }
  return values;
}

Result<CommandLine> ParseCommandLine(const std::vector<std::string>& args, const std::vector<std::string>& environment, AvailableBytes available) {
  CommandLine result;
  std::vector<std::string> flags = args;
  if (!flags.empty() && !flags[0].starts_with("-")) {
    if (flags[0] == "worker") {
      result.verb = CommandLine::Verb::kWorker;
    } else if (flags[0] != "keeper") {
      return std::unexpected(Wrong("\"" + flags[0] + "\" is not a command; there are: keeper (the default), worker (started by the keeper)"));
    }
    flags.erase(flags.begin());
  }
  const bool is_worker = result.verb == CommandLine::Verb::kWorker;

  CLI::App app("safepointd keeps checkpoints of training jobs in this node's memory.", "safepointd");
  bool print_settings = false, version = false;
  std::string config;
  std::map<std::string, std::string> texts;
  std::map<std::string, CLI::Option*> options;
  for (const SettingInfo& info : ListSettings()) {
    const std::string help = info.help + " [" + info.range + "]";
    const std::string flag = FlagName(info.name);
    std::string& text = texts[info.name];
    options[info.name] = info.kind == SettingInfo::Kind::kBool ? app.add_flag(flag + "{true}", text, help) : app.add_option(flag, text, help);
  }
  CLI::Option* config_option = app.add_option("--config", config, "TOML file with settings");
  app.add_flag("--print-settings", print_settings, "Print the effective settings as TOML and exit");
  app.add_flag("--version", version, "Print the version and exit");
  std::string node, boot;
  if (is_worker) {
    app.add_option("--of-node", node, "Id of the node")->required();
    app.add_option("--of-boot", boot, "Id of the keeper's life")->required();
  }
  try {
    std::vector<std::string> reversed(flags.rbegin(), flags.rend());  // CLI11 takes them from the back.
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    result.verb = CommandLine::Verb::kText;
    result.text = HelpText(app);
    return result;
  } catch (const CLI::ParseError& error) {
    return std::unexpected(Wrong(std::string(error.what())));
  }
  if (version) {
    result.verb = CommandLine::Verb::kText;
    result.text = "safepointd " + VersionText() + "\n";
    return result;
  }

  GivenValues given;
  if (is_worker) {
    if (!Id128::FromHex(node, &result.node)) return std::unexpected(Wrong("--of-node is not an id"));
    if (!Id128::FromHex(boot, &result.boot)) return std::unexpected(Wrong("--of-boot is not an id"));
  } else {
    std::string config_from_environment;
    SP_ASSIGN_OR_RETURN(GivenValues from_environment, FromEnvironment(environment, &config_from_environment));
    if (config_option->count() == 0) config = config_from_environment;
    if (config_option->count() > 0 || !config_from_environment.empty()) {
      if (config.find_first_of("\r\n") != std::string::npos) return std::unexpected(Wrong("setting config: the path contains a line break"));
      const auto text = ReadFile(config, kConfigBytesMax);
      if (!text) return std::unexpected(Wrong("setting config = \"" + config + "\": " + text.error().message()));
      SP_ASSIGN_OR_RETURN(given, ParseSettingsToml(*text, config));
    }
    for (auto& [name, value] : from_environment) given[name] = value;
  }
  for (const auto& [name, option] : options) {
    if (option->count() > 0) given[name] = {texts[name], FlagName(name)};
  }
  SP_ASSIGN_OR_RETURN(result.settings, MakeSettings(given, is_worker ? std::nullopt : available));
  if (print_settings) {
    result.verb = CommandLine::Verb::kPrintSettings;
    result.text = SettingsToToml(result.settings, given);
  }
  return result;
}

}  // namespace sp
