// FaultyStore: any store, and what real ones do wrong, on demand. For tests and the simulator. Thread-safe; which of several threads meets the n-th
// call is then up to them.
//
// The rows F57 to F69 of the table of faults that it plays are named beside each kind. It never sleeps: a call that hangs asks
// the test to let time pass, a call that arrives after its caller gave up waits for DeliverLate.
#pragma once

#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "durable/object_store.h"

namespace sp {

enum class StoreCall { kProbe, kPut, kCreate, kReadRange, kHead, kList, kDelete, kListUploads, kAbortUpload };
inline constexpr size_t kStoreCalls = 9;

enum class FaultKind {
  kFailBefore,      // Nothing happened: 500 and 503, resets (F57), an error inside a 200 (F59), expired or refused credentials (F63, F64), 301 (F65).
  kFailAfter,       // It happened, the answer was lost (F60).
  kHang,            // Nothing happened, for as long as the caller waits; kDeadline, or kClosed if it was cancelled meanwhile (F58).
  kArriveLate,      // Put, Create, Delete: kDeadline, and it happens at DeliverLate (F58).
  kTruncateStored,  // Put, Create: kOk, but the object has lost its last byte (F66).
  kFlipStored,      // Put, Create: kOk, but a bit of byte `at` is wrong (F66).
  kLoseStored,      // Put, Create: kOk, but the object is gone (F68).
  kFlipRead,        // ReadRange: the object is right, byte `at` of what arrives is not (F66).
  kDropUpload,      // Put: takes half the bytes, then the upload is gone: aborted by a rule or an operator (F62). Nothing is left.
  kLeaveUpload,     // Put: takes half the bytes and fails. An unfinished upload is left (F61).
  kListLags,        // List: without the `at` objects that were written last through this wrapper (F67).
  kListLosesRest,   // List: the first object only, and says that there are no more (F67).
};

struct Fault {
  static constexpr uint64_t kForEver = std::numeric_limits<uint64_t>::max();

  StoreCall call;
  FaultKind kind;
  uint64_t nth = 1;      // Of the calls of this kind, counted from Add, whose key contains `key_part`...
  uint64_t times = 1;    // ... this one and the following.
  std::string key_part;  // Empty: any.
  Status status{StatusCode::kUnavailable, "503 slow down"};  // What a kFail*, kDropUpload and kLeaveUpload says.
  uint64_t at = 0;       // A byte beyond the end: the last one.
};

class FaultyStore final : public ObjectStore {
 public:
  // `inner` and `clock` live at least as long. `seed` decides what AddChance does, on one thread reproducibly.
  FaultyStore(ObjectStore& inner, const Clock& clock, uint64_t seed = 0) : inner_(inner), clock_(clock), random_(seed) {}

  // Of several faults that would strike one call, the one added first does.
  void Add(Fault fault);
  // From now on `percent` of these calls meet this fault. After the scripted ones.
  void AddChance(unsigned percent, Fault fault);
  void Clear();  // Forgets faults and chances. What is late stays late.

  // Called, on the thread of the call, when a call hangs: a test moves its clock to the deadline here, or cancels.
  void OnHang(std::function<void(const CallLimits&)> hook);
  // Carries out what is late, in the order of the calls, and returns what the store answered: nobody else hears it.
  std::vector<Status> DeliverLate();

  uint64_t calls(StoreCall call) const;  // Since the store was made, those that failed included.
  uint64_t faults() const;               // That struck.

  const std::string& url() const override { return inner_.url(); }
  Result<StoreAbilities> Probe(const CallLimits& limits) override;
  Status Put(const std::string& key, const PutSource& source, const CallLimits& limits) override;
  Result<bool> Create(const std::string& key, ByteSpan content, const CallLimits& limits) override;
  Status ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) override;
  Result<ObjectInfo> Head(const std::string& key, const CallLimits& limits) override;
  Result<ListPage> List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) override;
  Status Delete(const std::string& key, const CallLimits& limits) override;
  Result<std::vector<UnfinishedUpload>> ListUploads(const std::string& prefix, const CallLimits& limits) override;
  Status AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) override;

 private:
  struct Armed {
    Fault fault;
    unsigned percent = 100;
    uint64_t seen = 0;
  };

  std::optional<Fault> Take(StoreCall call, const std::string& key);
  uint64_t Random();
  Status Hang(const std::string& what, const CallLimits& limits);
  Status Late(const std::string& what, std::function<Status()> run);
  Status Damage(const std::string& key, const Fault& fault);
  Status HalfPut(const std::string& key, const PutSource& source, const CallLimits& limits, const Fault& fault);
  void Written(const std::string& key);
  // The kinds that every call knows.
  template <typename Run>
  auto Through(const std::optional<Fault>& fault, const std::string& what, const CallLimits& limits, const Run& run) -> decltype(run());

  ObjectStore& inner_;
  const Clock& clock_;

  mutable std::mutex mutex_;  // Guards what follows; never held while the inner store or a hook is called.
  uint64_t random_;
  std::vector<Armed> scripted_, chances_;
  std::function<void(const CallLimits&)> on_hang_;
  std::vector<std::function<Status()>> late_;
  std::vector<std::string> written_;  // Keys, the newest last, each once.
  std::vector<UnfinishedUpload> uploads_;
  uint64_t last_upload_ = 0;
  uint64_t calls_[kStoreCalls] = {};
  uint64_t faults_ = 0;
};

}  // namespace sp
