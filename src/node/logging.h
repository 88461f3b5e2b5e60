// The worker's log: one JSON object per line on stderr, which the keeper has pointed at the log file. Owned by the event loop.
//
// {"ts":"2026-01-31T12:00:00.123Z","level":"info","component":"worker","event":"attempt_complete","namespace":"...",...}
// Values are strings, escaped; bytes that are not UTF-8 are replaced. Wall time appears here for people and decides nothing.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "node/core_types.h"
#include "node/settings.h"

namespace spdlog {
class logger;
}

namespace sp {

using LogFields = std::vector<std::pair<std::string, std::string>>;
using LogSeverity = action::Log::Severity;

// How many lines one user may cause: a burst, then so many a second. Pure but for the time that is passed in.
class LineBudget {
 public:
  explicit LineBudget(uint32_t lines_per_second) : rate_(lines_per_second), level_(10.0 * lines_per_second) {}
  bool Take(Nanos now);
  // Lines refused since the last Take that was granted; 0 from then on.
  uint64_t TakeRefused() { return std::exchange(refused_, 0); }

 private:
  double rate_, level_;
  Nanos at_ = 0;
  uint64_t refused_ = 0;
};

std::string JsonLine(const std::string& timestamp, LogSeverity severity, const std::string& event, const LogFields& fields);

class Logger {
 public:
  Logger(LogLevel level, uint32_t lines_per_uid);
  ~Logger();

  void Log(LogSeverity severity, const std::string& event, const LogFields& fields = {});
  // A line that `uid` can cause at will: over its budget it is counted instead, and the count is logged with the next line that passes.
  void LogOfUid(Nanos now, uint32_t uid, LogSeverity severity, const std::string& event, const LogFields& fields = {});

 private:
  bool Wanted(LogSeverity severity) const;

  LogLevel level_;
  uint32_t lines_per_uid_;
  std::map<uint32_t, LineBudget> budgets_;  // Bounded: see kBudgetsMax.
  std::unique_ptr<spdlog::logger> logger_;
};

}  // namespace sp
