// The daemon's side of the socket, for tests: answers every request from a small model, unless a test's hook answers instead.
// Thread-safe. Memory is real: sealed memfds.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "format/messages.h"
#include "os/fd.h"

namespace sp {

class FakeDaemon {
 public:
  struct Answer {
    std::optional<Frame> frame;
    std::vector<int> fds;          // Sent with the frame; borrowed.
    std::vector<uint8_t> garbage;  // Sent instead of a frame.
    bool close = false;            // Afterwards the connection is closed. Alone: a worker that dies before it answers.
  };
  // Nothing: the model answers.
  using Hook = std::function<std::optional<Answer>(const Frame&)>;

  explicit FakeDaemon(std::string socket_path, uint64_t extent_bytes = kBlockBytes);
  ~FakeDaemon() { Stop(); }

  void Start();            // Listens.
  void Stop();             // Closes the listener and every connection: nobody serves.
  void DropConnections();  // As the death of a worker whose keeper lives.
  void ReplaceMemory();    // As the death of the keeper: another boot, nothing known.

  void SetHook(MessageType type, Hook hook);
  std::vector<Frame> Seen(MessageType type) const;
  size_t SeenCount(MessageType type) const { return Seen(type).size(); }
  // Blocks until `count` requests of the type have come; aborts the test program after 20 s.
  void AwaitSeen(MessageType type, size_t count);

  // Changes bytes of the sealed shard of rank 0, behind everybody's back.
  void Corrupt(uint64_t offset);
  std::vector<uint8_t> SlotBytes(uint64_t slot, uint64_t offset, uint64_t size) const;
  size_t connections() const;

  uint64_t lease_ns = 60'000'000'000;  // To be set before Start.
  uint64_t pin_ns = 600'000'000'000;
  std::vector<uint64_t> gone_slots;    // Of the next Reserve.

 private:
  struct Shard {
    SealRecord record;
    uint64_t slot = 0;
  };

  void Accept();
  void Serve(int fd);
  Answer Handle(const Frame& request);
  Answer Model(const Frame& request);
  uint64_t MakeSlot(uint64_t bytes);
  Answer Fetch(const Frame& request);
  Answer Seal(const Frame& request);

  const std::string path_;
  const uint64_t extent_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable seen_changed_;
  Fd listener_;
  std::atomic<bool> stop_ = false;
  std::thread accepting_;
  std::vector<std::thread> serving_;
  std::set<int> connections_;
  std::map<MessageType, Hook> hooks_;
  std::vector<Frame> seen_;
  Id128 boot_{{1}};
  uint64_t next_id_ = 100;
  std::map<uint64_t, std::vector<Fd>> slots_;
  std::set<uint64_t> idle_slots_;
  std::map<uint64_t, std::pair<ReserveRequest, uint64_t>> leases_;  // Request and slot.
  std::optional<Shard> sealed_;
};

}  // namespace sp
