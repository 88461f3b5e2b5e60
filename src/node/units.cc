#include "node/units.h"

#include <limits>
#include <utility>

namespace sp {
namespace {

struct Unit {
  std::string_view name;
  uint64_t factor;
};

constexpr Unit kSizeUnits[] = {{"TiB", uint64_t{1} << 40}, {"GiB", 1u << 30}, {"MiB", 1u << 20}, {"KiB", 1u << 10}};
constexpr Unit kDurationUnits[] = {
    {"h", 3600 * uint64_t{kNanosPerSecond}}, {"min", 60 * uint64_t{kNanosPerSecond}}, {"s", kNanosPerSecond}, {"ms", kNanosPerMilli}};

// The digits at the start, and what follows them.
std::pair<std::string_view, std::string_view> SplitDigits(std::string_view text) {
  const size_t end = std::min(text.find_first_not_of("0123456789"), text.size());
  return {text.substr(0, end), text.substr(end)};
}

std::optional<uint64_t> Multiply(std::optional<uint64_t> count, uint64_t factor, uint64_t max) {
  if (!count || *count > max / factor) return std::nullopt;
  return *count * factor;
}

}  // namespace

std::optional<uint64_t> ParseCount(std::string_view text) {
  if (text.empty() || text.size() > 20) return std::nullopt;
  uint64_t value = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return std::nullopt;
    const uint64_t digit = static_cast<uint64_t>(c - '0');
    if (value > (std::numeric_limits<uint64_t>::max() - digit) / 10) return std::nullopt;
    value = value * 10 + digit;
  }
  return value;
}

std::optional<uint64_t> ParseSize(std::string_view text) {
  const auto [digits, suffix] = SplitDigits(text);
  if (suffix.empty()) return ParseCount(digits);
  for (const Unit& unit : kSizeUnits) {
    if (suffix == unit.name) return Multiply(ParseCount(digits), unit.factor, std::numeric_limits<uint64_t>::max());
  }
  return std::nullopt;
}

std::string FormatSize(uint64_t bytes) {
  for (const Unit& unit : kSizeUnits) {
    if (bytes != 0 && bytes % unit.factor == 0) return std::to_string(bytes / unit.factor) + std::string(unit.name);
  }
  return std::to_string(bytes);
}

std::optional<Nanos> ParseDuration(std::string_view text) {
  if (text == "0") return 0;
  const auto [digits, suffix] = SplitDigits(text);
  for (const Unit& unit : kDurationUnits) {
    if (suffix != unit.name) continue;
    const auto value = Multiply(ParseCount(digits), unit.factor, static_cast<uint64_t>(std::numeric_limits<Nanos>::max()));
    if (!value) return std::nullopt;
    return static_cast<Nanos>(*value);
  }
  return std::nullopt;
}

std::string FormatDuration(Nanos duration) {
  const uint64_t value = static_cast<uint64_t>(duration);
  if (value == 0) return "0";
  for (const Unit& unit : kDurationUnits) {
    if (value % unit.factor == 0) return std::to_string(value / unit.factor) + std::string(unit.name);
  }
  return std::to_string(value / kNanosPerMilli) + "ms";
}

}  // namespace sp
