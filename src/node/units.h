// Sizes, durations and small numbers as people write them in settings. Pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/clock.h"

namespace sp {

// Plain decimal digits only: no sign, no blank, no exponent, no overflow.
std::optional<uint64_t> ParseCount(std::string_view text);

// "67108864", "64MiB", "1GiB": bytes, or a whole number of KiB, MiB, GiB, TiB. Decimal units (MB, GB) are refused rather than guessed.
std::optional<uint64_t> ParseSize(std::string_view text);
// In the largest unit that divides it, so that ParseSize gives the same number back.
std::string FormatSize(uint64_t bytes);

// "250ms", "60s", "5min", "24h", or "0". A number without its unit is refused: seconds and milliseconds are too easily confused.
std::optional<Nanos> ParseDuration(std::string_view text);
// Whole milliseconds are expected; ParseDuration gives the same value back.
std::string FormatDuration(Nanos duration);

}  // namespace sp
