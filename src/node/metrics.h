// What the HTTP pages show: written by the event loop, read by the HTTP thread. docs/operating/metrics.md lists the metrics.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "base/clock.h"
#include "http/http_server.h"

namespace sp {

// What the worker counts beside the core.
struct WorkerCounters {
  uint64_t incarnation = 0, uptime_seconds = 0;
  uint64_t extents_held = 0, extents_to_come = 0;  // Of the keeper; still being made since its start.
  uint64_t ledger_bytes = 0, ledger_bytes_max = 0, ledger_compactions = 0, ledger_damaged_entries = 0;
  uint64_t frames_received = 0, frames_refused = 0, clients_dropped = 0;
  uint64_t marker_failures = 0;
};

// Prometheus text from the core's status (NodeCore::StatusJson for all uids) and the worker's counters. Pure.
std::string RenderMetrics(const std::string& core_status_json, const WorkerCounters& worker);
// The core's status with the worker's counters added. Pure.
std::string RenderStatus(const std::string& core_status_json, const WorkerCounters& worker);

// Thread-safe.
class StatusBoard {
 public:
  static constexpr Nanos kHealthyWithin = 2 * kNanosPerSecond;

  explicit StatusBoard(const Clock& clock) : clock_(clock) {}

  void Beat() { beat_at_ = clock_.Now(); }  // The event loop lives.
  void Publish(std::string status, std::string metrics);

  HttpResponse HealthPage() const;
  HttpResponse MetricsPage() const;
  HttpResponse StatusPage() const;

 private:
  const Clock& clock_;
  std::atomic<Nanos> beat_at_ = 0;
  mutable std::mutex mutex_;  // Guards the two texts.
  std::string status_, metrics_;
};

}  // namespace sp
