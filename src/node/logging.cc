#include "node/logging.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

namespace sp {
namespace {

constexpr size_t kBudgetsMax = 4096;  // Beyond, users that come later share the first one's forgetfulness: all start anew.

const char* SeverityName(LogSeverity severity) {
  switch (severity) {
    case LogSeverity::kDebug: return "debug";
    case LogSeverity::kInfo: return "info";
    case LogSeverity::kWarning: return "warn";
    case LogSeverity::kError: return "error";
  }
  return "error";
}

std::string TimestampNow() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto millis = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
  const std::time_t seconds = static_cast<std::time_t>(millis / 1000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char date[32], text[48];
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text, sizeof text, "%s.%03dZ", date, static_cast<int>(millis % 1000));
  return text;
}

}  // namespace

bool LineBudget::Take(Nanos now) {
  if (at_ != 0) level_ = std::min(10 * rate_, level_ + rate_ * static_cast<double>(now - at_) / kNanosPerSecond);
  at_ = now;
  if (level_ < 1) {
    ++refused_;
    return false;
  }
  level_ -= 1;
  return true;
}

std::string JsonLine(const std::string& timestamp, LogSeverity severity, const std::string& event, const LogFields& fields) {
  nlohmann::ordered_json line = {{"ts", timestamp}, {"level", SeverityName(severity)}, {"component", "worker"}, {"event", event}};
  for (const auto& [name, value] : fields) line[name] = value;
  return line.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace);
}

Logger::Logger(LogLevel level, uint32_t lines_per_uid)
    : level_(level), lines_per_uid_(lines_per_uid),
      logger_(std::make_unique<spdlog::logger>("worker", std::make_shared<spdlog::sinks::stderr_sink_st>())) {  // Shared by spdlog's own wish.
  logger_->set_pattern("%v");
  logger_->set_level(spdlog::level::trace);
}

Logger::~Logger() = default;

bool Logger::Wanted(LogSeverity severity) const { return static_cast<int>(severity) >= static_cast<int>(level_); }

void Logger::Log(LogSeverity severity, const std::string& event, const LogFields& fields) {
  if (!Wanted(severity)) return;
  logger_->log(spdlog::level::info, spdlog::string_view_t(JsonLine(TimestampNow(), severity, event, fields)));
  logger_->flush();
}

void Logger::LogOfUid(Nanos now, uint32_t uid, LogSeverity severity, const std::string& event, const LogFields& fields) {
  if (!Wanted(severity)) return;
  if (budgets_.size() >= kBudgetsMax && !budgets_.contains(uid)) budgets_.clear();
  LineBudget& budget = budgets_.try_emplace(uid, lines_per_uid_).first->second;
  if (!budget.Take(now)) return;
  if (const uint64_t refused = budget.TakeRefused(); refused > 0) {
    Log(LogSeverity::kWarning, "log_lines_suppressed", {{"uid", std::to_string(uid)}, {"lines", std::to_string(refused)}});
  }
  Log(severity, event, fields);
}

}  // namespace sp
