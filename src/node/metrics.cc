#include "node/metrics.h"

#include <nlohmann/json.hpp>
#include <utility>

namespace sp {
namespace {

using Json = nlohmann::ordered_json;

const HttpResponse kStarting{503, "text/plain; charset=utf-8", "the worker is starting\n"};

// One metric family; values are added as samples.
class Text {
 public:
  void Family(const std::string& name, const char* type, const char* help) {
    name_ = "safepoint_" + name;
    out_ += "# HELP " + name_ + " " + help + "\n# TYPE " + name_ + " " + type + "\n";
  }
  void Sample(uint64_t value, const std::string& labels = "") {
    out_ += name_ + (labels.empty() ? "" : "{" + labels + "}") + " " + std::to_string(value) + "\n";
  }
  void One(const std::string& name, const char* type, const char* help, uint64_t value) {
    Family(name, type, help);
    Sample(value);
  }
  std::string Take() { return std::move(out_); }

 private:
  std::string name_, out_;
};

// The number at `path`, 0 when the core does not report it.
uint64_t At(const Json& status, const char* path) {
  const Json::json_pointer pointer(path);
  return status.contains(pointer) && status.at(pointer).is_number() ? status.at(pointer).get<uint64_t>() : 0;
}

}  // namespace

std::string RenderMetrics(const std::string& core_status_json, const WorkerCounters& worker) {
  const Json core = Json::parse(core_status_json);
  Text text;
  text.Family("build_info", "gauge", "Version of the daemon; always 1.");
  text.Sample(1, "version=\"" + core.value("version", std::string("unknown")) + "\"");
  text.One("worker_incarnation", "gauge", "Workers that this keeper has started.", worker.incarnation);
  text.One("worker_uptime_seconds", "gauge", "Age of this worker.", worker.uptime_seconds);

  text.One("pool_bytes_max", "gauge", "Memory for checkpoints, at most.", At(core, "/pool/bytes_max"));
  text.One("pool_held_bytes", "gauge", "Memory for checkpoints that the keeper has made.", worker.extents_held * At(core, "/pool/extent_bytes"));
  text.One("pool_to_come_bytes", "gauge", "Memory that the keeper is still making since its start.", worker.extents_to_come * At(core, "/pool/extent_bytes"));
  text.Family("pool_bytes", "gauge", "Bytes of extents in use or ready, by state.");
  for (const char* state : {"creating", "free", "pending", "idle", "leased", "sealed", "zombie"}) {
    text.Sample(At(core, (std::string("/pool/") + state).c_str()), std::string("state=\"") + state + "\"");
  }
  text.One("extent_bytes", "gauge", "Size of one extent.", At(core, "/pool/extent_bytes"));

  text.One("connections", "gauge", "Connected clients.", At(core, "/connections"));
  text.One("sessions", "gauge", "Sessions of client processes.", At(core, "/sessions"));
  text.One("open_leases", "gauge", "Shards being written.", At(core, "/totals/open_leases"));
  text.One("read_pins", "gauge", "Restores in progress.", At(core, "/read_pins"));
  text.One("sealed_shards", "gauge", "Sealed shards held.", At(core, "/totals/sealed_shards"));
  text.Family("attempts", "gauge", "Attempts held, by state, and complete ones by level.");
  text.Sample(At(core, "/attempts/open"), "state=\"open\",level=\"none\"");
  text.Sample(At(core, "/attempts/complete") - At(core, "/attempts/durable"), "state=\"complete\",level=\"memory\"");
  text.Sample(At(core, "/attempts/durable"), "state=\"complete\",level=\"durable\"");
  text.Sample(At(core, "/attempts/corrupt"), "state=\"corrupt\",level=\"none\"");

  text.One("seals_total", "counter", "Shards sealed by this worker.", At(core, "/totals/seals"));
  text.One("attempts_completed_total", "counter", "Attempts that became complete.", At(core, "/totals/completed"));
  text.One("attempts_closed_total", "counter", "Attempts that ended without becoming complete.", At(core, "/totals/closed"));
  text.One("attempts_retired_total", "counter", "Complete attempts that made room for newer ones.", At(core, "/totals/retired"));
  text.One("shards_quarantined_total", "counter", "Shards found corrupt.", At(core, "/totals/quarantined"));
  if (core.contains("durable") && core.at("durable").is_object()) {
    text.One("durable_steps_waiting", "gauge", "Steps on their way to the store.", At(core, "/durable/steps_waiting"));
    text.One("durable_steps_in_trouble", "gauge", "Those whose last try failed.", At(core, "/durable/steps_in_trouble"));
    text.One("durable_steps_total", "counter", "Steps that became durable.", At(core, "/durable/completed"));
    text.One("durable_failures_total", "counter", "Tries to reach the store that failed.", At(core, "/durable/failures"));
    text.One("durable_deleted_total", "counter", "Steps that the setting durable_keep_... let go of.", At(core, "/durable/deleted"));
    text.One("durable_bytes_total", "counter", "Bytes of shards that the store has confirmed.", At(core, "/durable/bytes"));
  }
  text.One("requests_refused_total", "counter", "Requests answered with an error.", At(core, "/totals/refused"));
  text.One("frames_received_total", "counter", "Messages received from clients.", worker.frames_received);
  text.One("frames_refused_total", "counter", "Messages that were none of the protocol.", worker.frames_refused);
  text.One("clients_dropped_total", "counter", "Connections that the worker closed because of what the client did.", worker.clients_dropped);

  text.One("ledger_bytes", "gauge", "Used part of the ledger's active area.", worker.ledger_bytes);
  text.One("ledger_bytes_max", "gauge", "Size of the ledger's active area.", worker.ledger_bytes_max);
  text.One("ledger_compactions_total", "counter", "Times the ledger was rewritten.", worker.ledger_compactions);
  text.One("ledger_damaged_entries", "gauge", "Entries that this worker could not read when it started.", worker.ledger_damaged_entries);
  text.One("marker_failures_total", "counter", "Markers that could not be written to the state directory.", worker.marker_failures);
  return text.Take();
}

std::string RenderStatus(const std::string& core_status_json, const WorkerCounters& worker) {
  Json status = Json::parse(core_status_json);
  status["worker"] = {{"uptime_seconds", worker.uptime_seconds},     {"extents_held", worker.extents_held},
                      {"extents_to_come", worker.extents_to_come},   {"ledger_bytes", worker.ledger_bytes},
                      {"ledger_bytes_max", worker.ledger_bytes_max}, {"ledger_damaged_entries", worker.ledger_damaged_entries}};
  return status.dump(2) + "\n";
}

void StatusBoard::Publish(std::string status, std::string metrics) {
  const std::lock_guard lock(mutex_);
  status_ = std::move(status);
  metrics_ = std::move(metrics);
}

HttpResponse StatusBoard::HealthPage() const {
  const Nanos silent = clock_.Now() - beat_at_;
  if (silent <= kHealthyWithin) return {200, "application/json", "{\"status\":\"ok\"}\n"};
  return {503, "application/json", "{\"status\":\"stalled\",\"silent_ms\":" + std::to_string(silent / kNanosPerMilli) + "}\n"};
}

HttpResponse StatusBoard::MetricsPage() const {
  const std::lock_guard lock(mutex_);
  if (metrics_.empty()) return kStarting;
  return {200, "text/plain; version=0.0.4; charset=utf-8", metrics_};
}

HttpResponse StatusBoard::StatusPage() const {
  const std::lock_guard lock(mutex_);
  if (status_.empty()) return kStarting;
  return {200, "application/json", status_};
}

}  // namespace sp
