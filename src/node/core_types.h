// Events into, and actions out of, NodeCore. The shell (node/worker) turns sockets, timers, files and the keeper into events and carries out
// actions in order; the simulator does the same with its own clock and faults. Pure.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/status.h"
#include "format/ledger.h"
#include "format/messages.h"
#include "format/shard_index.h"
#include "format/stored_step.h"

namespace sp {

using ConnectionId = uint64_t;  // Given by the shell, never reused.

// ---- Events -----------------------------------------------------------------------------------------------------------------------------
namespace event {
struct Connected {  // A client's socket was accepted; identity from the kernel, not from the client.
  ConnectionId connection;
  uint32_t uid = 0, pid = 0;
  uint64_t start_time = 0;
};
struct Received {  // One whole frame that decoded; a frame that did not makes the shell answer kProtocol and close.
  ConnectionId connection;
  Frame frame;
};
struct Disconnected {
  ConnectionId connection;
};
struct SessionDied {  // The session's process is known dead (its pidfd became readable).
  Id128 session;
};
struct SessionUnwatchable {  // The kernel or the pid namespace gives no way to know when it dies: its extents are never reused.
  Id128 session;
};
struct SealChecked {  // Answer to action::CheckSeal.
  uint64_t lease = 0;
  Status status;                            // kCorrupt: the list does not hash to the root. kProtocol: malformed static part.
  std::shared_ptr<PackedIndex> structure;   // If it was asked for and is valid.
};
struct BlockChecked {  // Answer to action::CheckBlock. kOk: the block is fine.
  uint64_t token = 0;
  Status status;
};
struct StructureRead {  // Answer to action::ReadStructure.
  Hash256 record;
  Status status;
  std::shared_ptr<PackedIndex> structure;  // If it is valid.
};
struct ShardStored {  // Answer to action::StoreShard. kOk: every byte in the store is confirmed.
  Hash256 record;
  Status status;
  bool read_back = false;  // By reading it back, where the store does not look at checksums.
};
struct ShardProgress {  // Of one that is under way: bytes that have reached the store.
  Hash256 record;
  uint64_t bytes = 0;
  bool alive = false;  // Since the last time it was read back, or waited for its turn: the store is not what keeps it.
};
struct ManifestStored {  // Answer to action::StoreManifest.
  Id128 attempt;
  Status status;
};
struct StoreListed {  // Answer to action::ListStore.
  uint32_t uid = 0;
  std::string ns;
  Status status;
  std::vector<StoredStep> steps;  // Of this user; the newest ones.
  Status newest;                  // Not OK: what is the newest by the store's clock is damaged (F68); names it.
};
struct RetentionPlanned {  // Answer to action::PlanRetention.
  uint32_t uid = 0;
  std::string ns;
  Status status;
  std::vector<Departure> departures;
};
struct StepsDeleted {  // Answer to action::DeleteSteps.
  uint32_t uid = 0;
  std::string ns;
  Status status;                // Not OK: why the others are still there.
  std::vector<StepName> steps;  // That are gone.
};
struct StoreSwept {  // What dead writers left in the store was looked for.
  Status status;
  uint64_t uploads = 0;  // That were aborted.
};
struct ExtentCreated {
  uint32_t extent = 0;
};
struct ExtentFailed {  // The keeper could not create it: no memory.
  uint32_t extent = 0;
  Status status;
};
struct Tick {};      // NextDeadline() has come, or is over.
struct Shutdown {};  // SIGTERM.
}  // namespace event

using Event = std::variant<event::ShardStored, event::ShardProgress, event::ManifestStored, event::StoreListed, event::RetentionPlanned,
                           event::StepsDeleted, event::StoreSwept,
                           event::Connected, event::Received, event::Disconnected, event::SessionDied, event::SessionUnwatchable, event::SealChecked,
                           event::BlockChecked, event::StructureRead, event::ExtentCreated, event::ExtentFailed, event::Tick, event::Shutdown>;

// ---- Actions: carried out in order ---------------------------------------------------------------------------------------------------------
namespace action {
struct Append {  // Ledger entry; carried out before any later action, so that nothing is acknowledged that a SIGKILL could lose.
  LedgerEntry entry;
};
struct Send {
  ConnectionId connection = 0;
  Frame frame;
  std::vector<uint32_t> extents;  // Descriptors that go with it, in order.
  bool read_only = false;         // Send them re-opened read-only.
};
struct Close {
  ConnectionId connection = 0;
};
struct WatchSession {  // Report SessionDied (at once if it is dead already) or SessionUnwatchable. With a connection: by its pidfd.
  SessionKey session;
  ConnectionId connection = 0;  // 0: re-adopted after a restart; by pid and start time.
};
struct UnwatchSession {
  Id128 session;
};
struct CheckSeal {  // Copy the checksum list out once, compare with the root; hash and parse the static part if asked to.
  uint64_t lease = 0;
  std::vector<uint32_t> extents;
  uint64_t length_bytes = 0, header_bytes = 0, static_offset = 0;
  Hash256 block_root, structure;
  uint32_t whole_crc = 0;  // Must be the combination of the list.
  bool want_structure = false;
};
struct ReadStructure {  // The static part of a sealed shard, for the coverage check: after a restart, or when it was not kept.
  Hash256 record;       // Identity of its seal record.
  std::vector<uint32_t> extents;
  uint64_t header_bytes = 0, static_offset = 0;
  Hash256 structure;
};
struct CheckBlock {  // Re-read the checksum list (against the root) and one block.
  uint64_t token = 0;
  std::vector<uint32_t> extents;
  uint64_t length_bytes = 0, block = 0;
  Hash256 block_root;
};
struct StoreShard {  // Bring it to the store, under the keys that its record gives it (format/stored_step.h), and have the store confirm it.
  SealRecord record;
  std::vector<uint32_t> extents;
};
struct StoreManifest {  // All its shards are there: make the manifest object, which makes the step.
  Id128 attempt;
  StoredStep step;
};
struct ListStore {  // What the store has of one namespace.
  uint32_t uid = 0;
  std::string ns;
};
struct PlanRetention {  // What of one user's namespace the store's rule lets go.
  uint32_t uid = 0;
  std::string ns;
};
struct DeleteSteps {  // From the store.
  uint32_t uid = 0;
  std::string ns;
  std::vector<StepName> steps;
};
struct CreateExtents {
  uint32_t first = 0, count = 0;
};
struct DropExtents {  // Close the descriptors here and in the keeper.
  std::vector<uint32_t> extents;
};
struct WriteMarker {  // "This namespace had a complete step", outlives the keeper.
  Hash256 marker;     // MarkerOf(uid, ns)
};
struct Log {
  enum class Severity : uint8_t { kDebug, kInfo, kWarning, kError } severity = Severity::kInfo;
  std::string name;  // Event name, e.g. "attempt_complete".
  std::vector<std::pair<std::string, std::string>> fields;
  bool evidence = false;  // Of a transition that somebody is told of (I-42): no bound on log lines drops it.
};
struct ExitDaemon {  // The daemon has nothing to stay for (private daemon), or was asked to stop.
  std::string reason;
};
}  // namespace action

using Action = std::variant<action::StoreShard, action::StoreManifest, action::ListStore, action::PlanRetention, action::DeleteSteps,
                            action::Append, action::Send, action::Close, action::WatchSession, action::UnwatchSession, action::CheckSeal,
                            action::ReadStructure, action::CheckBlock, action::CreateExtents, action::DropExtents, action::WriteMarker,
                            action::Log, action::ExitDaemon>;

Hash256 MarkerOf(uint32_t uid, const std::string& ns);

struct CoreConfig {
  Id128 node, boot;
  uint64_t incarnation = 1;  // Of this worker; ids given out contain it, so that none is ever reused.
  std::string version;
  uint32_t daemon_pid = 0;
  bool is_private = false;
  uint64_t extent_bytes = 64u << 20;
  uint32_t extents_max = 16;
  uint32_t retain = 2;  // Complete steps kept per namespace.
  uint64_t retain_every = 0;  // And those that are a multiple of it; 0: none.
  Nanos retain_for = 0;       // And those that became complete less than so long before the newest; 0: none.
  uint32_t retain_max = 2;    // So many in all, at most; not less than retain.
  Nanos lease_ns = 60 * kNanosPerSecond;
  Nanos pin_ns = 600 * kNanosPerSecond;
  Nanos handshake_ns = 5 * kNanosPerSecond;
  Nanos idle_exit_ns = 0;          // 0: never. No client for so long and nothing held: ExitDaemon.
  Nanos idle_exit_holding_ns = 0;  // The same while complete steps are held.
  uint32_t connections_max = 4096, connections_per_uid_max = 256;
  uint32_t open_attempts_max = 16;  // Per namespace.
  uint32_t pins_max = 1024;         // Per namespace.
  uint32_t namespaces_per_uid_max = 64;
  uint32_t generations_per_uid_max = 8192;  // They stay for ever, for what they fence, in a log of facts that all users share.
  uint64_t header_max = 16u << 20;      // Header of one shard, length word included.
  uint64_t structures_max = 32u << 20;  // What one user's open steps keep of their headers until all ranks have sealed.
  std::string store;                    // URL of the durable tier; empty: none.
  uint64_t durable_every = 0;           // Every step that is a multiple of it is made durable; 0: only what is asked for.
  Nanos durable_interval = 0;           // And the first complete step after so long; 0: none.
  uint32_t drains_max = 2;              // Shards on their way to the store at once.
  std::optional<uint64_t> durable_keeps;  // Something is deleted from the store; not the newest so many of a lineage. nullopt: nothing is.
  bool markers_known = true;          // False: the state directory cannot be read, so "never" cannot be told from "lost".
  std::vector<Hash256> markers;       // Namespaces that once had a complete step.
};

}  // namespace sp
