// The structures of one user's shards: which are known to be well-formed, and those whose coverage is still to be checked. Bounded: what one user's
// headers cost here is nobody else's loss, and never more than a budget (I-26, I-27).
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "format/shard_index.h"

namespace sp {

// Owned by the event loop.
class Structures {
 public:
  // kLimit: those that wait for their attempts' other ranks take the whole budget. Checked ones make room, the longest unused first.
  Status Add(const Hash256& hash, const std::shared_ptr<PackedIndex>& index, uint64_t budget);
  // Bytes of the tensors; nullopt: not known.
  std::optional<uint64_t> DataBytes(const Hash256& hash) const;
  // False: it has to be read again for a coverage check.
  bool IsKept(const Hash256& hash) const;
  uint64_t cost() const { return cost_; }

  // Whether these, by rank, fill their tensors; nullopt: some are not kept, and the answer is not known from before.
  std::optional<Status> Coverage(const std::vector<Hash256>& ranks);

  // Forgets all that are not in `live`. Those that are not in `open` wait for no check.
  void Trim(const std::set<Hash256>& live, const std::set<Hash256>& open);
  bool empty() const { return known_.empty(); }

 private:
  struct Known {
    uint64_t data_bytes = 0;
    std::shared_ptr<PackedIndex> index;  // Null: dropped after its check.
    bool checked = false;
    uint64_t used = 0;  // By uses_.
  };
  // The same list of names comes with the structure of each rank, and is kept once.
  void ShareNames(PackedIndex& index);
  uint64_t CostOfNames(const PackedIndex& index) const;
  void Keep(Known& known, const std::shared_ptr<PackedIndex>& index);
  void Drop(Known& known);
  bool MakeRoom(const PackedIndex& index, uint64_t budget);

  std::map<Hash256, Known> known_;
  std::map<const TextList*, uint32_t> names_;  // Lists of names, and how many structures have each.
  std::map<Hash256, Status> coverage_;         // By hash of the ranks' structure hashes.
  uint64_t cost_ = 0, uses_ = 0;
};

}  // namespace sp
