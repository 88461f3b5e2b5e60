// CheckCoverage: do the pieces of every tensor fill it exactly?
//
// Exactness without comparing pairs: a box is the sum of its 2^k corners, signed by the number of upper coordinates (the mixed difference of its
// indicator function). Boxes tile a whole exactly if and only if the signed corners of all boxes add up to the corners of the whole: inner corners
// cancel. That is linear in the pieces for the one or two dimensions that tensors are split along; dimensions that no piece splits are left out.
#include <algorithm>
#include <span>
#include <unordered_set>

#include "format/constants.h"
#include "format/shard_index.h"

namespace sp {
namespace {

// A real tensor has two or four corners per piece. The check runs in the event loop on what tenants send, so a tensor may have a few corners for each
// of its pieces, and all tensors together so many more.
constexpr uint64_t kCornersPerPieceMax = 8, kCornersBesideMax = uint64_t{1} << 19;

uint64_t Volume(const std::vector<uint64_t>& shape) {
  uint64_t volume = 1;
  for (uint64_t n : shape) volume *= n;  // Every parsed shape's product fits.
  return volume;
}

class Coverage {
 public:
  // All pieces of one tensor.
  Status Check(const std::string& name, std::span<const TensorPiece> pieces);

 private:
  using Box = std::pair<uint64_t, uint64_t>;  // Linear positions of its lowest and its highest corner: enough to tell boxes apart.
  bool TakeCorners(uint64_t boxes);
  void AddCorners(const TensorPiece& piece, bool negative);
  uint64_t Linear(const std::vector<uint64_t>& a, const std::vector<uint64_t>* b) const;

  uint64_t corners_left_ = kCornersBesideMax;
  std::vector<size_t> split_;      // Dimensions that some piece does not fill.
  std::vector<uint64_t> stride_;   // Of each of them in a grid with global + 1 positions.
  std::vector<std::pair<Box, const TensorPiece*>> boxes_;
  std::vector<uint64_t> corners_;  // Twice the position, and one more where the sign is negative.
};

uint64_t Coverage::Linear(const std::vector<uint64_t>& a, const std::vector<uint64_t>* b) const {
  uint64_t position = 0;
  for (size_t i = 0; i < split_.size(); ++i) position += stride_[i] * (a[split_[i]] + (b ? (*b)[split_[i]] : 0));
  return position;
}

// Whether so many boxes may have all their corners.
bool Coverage::TakeCorners(uint64_t boxes) {
  if (split_.size() > 32) return false;
  const uint64_t needed = boxes << split_.size(), free = boxes * kCornersPerPieceMax;
  if (needed <= free) return true;
  if (needed - free > corners_left_) return false;
  corners_left_ -= needed - free;
  return true;
}

void Coverage::AddCorners(const TensorPiece& piece, bool negative) {
  const uint64_t lowest = Linear(piece.offsets, nullptr);
  for (uint64_t upper = 0; upper < uint64_t{1} << split_.size(); ++upper) {
    uint64_t position = lowest;
    bool corner_negative = negative;
    for (size_t i = 0; i < split_.size(); ++i) {
      if (upper >> i & 1) {
        position += stride_[i] * piece.shape[split_[i]];
        corner_negative = !corner_negative;
      }
    }
    corners_.push_back(position << 1 | (corner_negative ? 1 : 0));
  }
}

Status Coverage::Check(const std::string& name, std::span<const TensorPiece> pieces) {
  const TensorPiece& first = pieces[0];
  const std::vector<uint64_t>& global = first.global_shape;
  const auto bad = [&](StatusCode code, const char* why) { return Status(code, "tensor " + name + ": " + why); };

  split_.clear();
  uint64_t filled = 0;  // Pieces with at least one element.
  std::vector<bool> is_split(global.size(), false);
  for (const TensorPiece& piece : pieces) {
    const TensorPiece* p = &piece;
    if (p->dtype != first.dtype) return bad(StatusCode::kCorrupt, "pieces differ in dtype");
    if (p->global_shape != global) return bad(StatusCode::kCorrupt, "pieces differ in global shape");
    if (p->shape.size() != global.size() || p->offsets.size() != global.size()) return bad(StatusCode::kCorrupt, "pieces differ in dimensions");
    for (size_t d = 0; d < global.size(); ++d) {
      if (p->shape[d] > global[d] || p->offsets[d] > global[d] - p->shape[d]) return bad(StatusCode::kCorrupt, "piece exceeds the global shape");
    }
    if (std::find(p->shape.begin(), p->shape.end(), 0u) != p->shape.end()) continue;
    ++filled;
    for (size_t d = 0; d < global.size(); ++d) is_split[d] = is_split[d] || p->shape[d] != global[d];
  }
  if (std::find(global.begin(), global.end(), 0u) != global.end()) return {};  // Nothing to fill.
  if (filled == 0) return bad(StatusCode::kIncomplete, "no piece holds any of its elements");
  for (size_t d = 0; d < global.size(); ++d) {
    if (is_split[d]) split_.push_back(d);
  }
  if (split_.empty()) return {};  // Every piece is the whole tensor.

  stride_.clear();
  uint64_t positions = 1;
  for (size_t d : split_) {
    stride_.push_back(positions);
    const bool overflow = global[d] == UINT64_MAX || __builtin_mul_overflow(positions, global[d] + 1, &positions);
    if (overflow || positions > uint64_t{INT64_MAX}) return bad(StatusCode::kLimit, "too large to check");
  }
  boxes_.clear();
  for (const TensorPiece& piece : pieces) {
    const TensorPiece* p = &piece;
    if (std::find(p->shape.begin(), p->shape.end(), 0u) != p->shape.end()) continue;
    boxes_.push_back({{Linear(p->offsets, nullptr), Linear(p->offsets, &p->shape)}, p});
  }
  std::sort(boxes_.begin(), boxes_.end());
  boxes_.erase(std::unique(boxes_.begin(), boxes_.end(), [](const auto& a, const auto& b) { return a.first == b.first; }), boxes_.end());

  // Pieces lie inside the tensor, so more elements than it has mean an overlap, and fewer a gap.
  const uint64_t whole = Volume(global);
  uint64_t sum = 0;
  for (const auto& [box, piece] : boxes_) {
    if (__builtin_add_overflow(sum, Volume(piece->shape), &sum) || sum > whole) return bad(StatusCode::kCorrupt, "pieces overlap in part");
  }
  if (sum < whole) return bad(StatusCode::kIncomplete, "pieces leave a gap");

  // Exactly as many elements: either a tiling, or a gap and an overlap of equal size.
  if (!TakeCorners(boxes_.size() + 1)) return bad(StatusCode::kLimit, "split along too many dimensions to check");
  corners_.clear();
  corners_.reserve((boxes_.size() + 1) << split_.size());
  for (const auto& [box, piece] : boxes_) AddCorners(*piece, false);
  AddCorners(TensorPiece{{}, {}, global, std::vector<uint64_t>(global.size(), 0), global, 0, 0}, true);
  std::sort(corners_.begin(), corners_.end());
  for (size_t i = 0; i < corners_.size();) {
    int64_t total = 0;
    const uint64_t position = corners_[i] >> 1;
    for (; i < corners_.size() && corners_[i] >> 1 == position; ++i) total += corners_[i] & 1 ? -1 : 1;
    if (total != 0) return bad(StatusCode::kCorrupt, "pieces overlap in part");
  }
  return {};
}

// An entry of a packed index: the tensor's name, then a piece: dimensions, dtype, offsets, shape, global shape; or kAlias and where in the same
// index the piece is, so that an alias takes no more room than its text.
constexpr char kAlias = 127;
static_assert(kTensorRankMax < kAlias);

void PackPiece(std::string& out, const TensorPiece& piece) {
  PackText(out, piece.name);
  out.push_back(static_cast<char>(piece.shape.size()));
  PackText(out, piece.dtype);
  for (const auto* list : {&piece.offsets, &piece.shape, &piece.global_shape}) {
    for (uint64_t n : *list) PackNumber(out, n);
  }
}

void UnpackPiece(std::string_view entries, size_t& at, TensorPiece& piece) {
  const size_t dimensions = static_cast<size_t>(entries[at++]);
  piece.dtype = UnpackText(entries, at);
  for (auto* list : {&piece.offsets, &piece.shape, &piece.global_shape}) UnpackNumbers(entries, at, dimensions, *list);
}

void SkipPiece(std::string_view entries, size_t& at) {
  const size_t dimensions = static_cast<size_t>(entries[at++]);
  UnpackText(entries, at);
  for (size_t i = 0; i < 3 * dimensions; ++i) UnpackNumber(entries, at);
}

// The entries of all ranks, those of one name together. Sorted by a hash first, so that millions of names are compared rarely; no map, because
// its nodes would take more memory than the entries.
class ByName {
 public:
  struct Ref {
    uint64_t hash;
    uint32_t rank, at;  // Place in the list of ranks, and in its entries.
  };

  explicit ByName(const std::vector<const PackedIndex*>& ranks) : ranks_(ranks) {
    size_t count = 0;
    for (const PackedIndex* rank : ranks) count += rank->count;
    refs.reserve(count);
    for (uint32_t rank = 0; rank < ranks.size(); ++rank) AddAll(rank);
    std::sort(refs.begin(), refs.end(), [this](const Ref& a, const Ref& b) {
      if (a.hash != b.hash) return a.hash < b.hash;
      if (const int order = Name(a).compare(Name(b)); order != 0) return order < 0;
      return std::pair(a.rank, a.at) < std::pair(b.rank, b.at);
    });
  }
  std::string_view Name(const Ref& ref) const {
    size_t at = ref.at;
    return UnpackText(ranks_[ref.rank]->entries, at);
  }
  bool Contains(std::string_view name) const {
    const auto before = [this](const Ref& ref, const std::pair<uint64_t, std::string_view>& key) {
      return ref.hash != key.first ? ref.hash < key.first : Name(ref) < key.second;
    };
    const auto found = std::lower_bound(refs.begin(), refs.end(), std::pair(Hash(name), name), before);
    return found != refs.end() && Name(*found) == name;
  }
  void Unpack(const Ref& ref, TensorPiece& piece) const {
    const std::string_view entries = ranks_[ref.rank]->entries;
    size_t at = ref.at;
    UnpackText(entries, at);
    if (entries[at] == kAlias) at = UnpackNumber(entries, ++at);
    UnpackPiece(entries, at, piece);
  }

  std::vector<Ref> refs;

 private:
  static uint64_t Hash(std::string_view name) { return std::hash<std::string_view>()(name); }
  void AddAll(uint32_t rank) {
    const std::string_view entries = ranks_[rank]->entries;
    for (size_t at = 0; at < entries.size();) {
      const uint32_t place = static_cast<uint32_t>(at);
      refs.push_back({Hash(UnpackText(entries, at)), rank, place});
      if (entries[at] == kAlias) UnpackNumber(entries, ++at);
      else SkipPiece(entries, at);
    }
  }

  const std::vector<const PackedIndex*>& ranks_;
};

// Of several tensors that are not whole, the one that was met first is named.
Status CheckTensors(const ByName& by_name) {
  Coverage coverage;
  std::vector<TensorPiece> pieces;  // Their lists are used again and again.
  std::string name;
  Status worst;
  std::pair<uint32_t, uint32_t> worst_at;
  for (size_t begin = 0, end; begin < by_name.refs.size(); begin = end) {
    const ByName::Ref& first = by_name.refs[begin];
    name = by_name.Name(first);
    for (end = begin + 1; end < by_name.refs.size() && by_name.refs[end].hash == first.hash && by_name.Name(by_name.refs[end]) == name; ++end) {}
    if (pieces.size() < end - begin) pieces.resize(end - begin);
    for (size_t i = begin; i < end; ++i) by_name.Unpack(by_name.refs[i], pieces[i - begin]);
    const Status status = coverage.Check(name, std::span(pieces).first(end - begin));
    if (status.ok() || (!worst.ok() && worst_at < std::pair(first.rank, first.at))) continue;
    worst = status;
    worst_at = {first.rank, first.at};
  }
  return worst;
}

// Those that differ, in the order in which they were first met.
template <typename T>
std::vector<const T*> Distinct(const std::vector<const T*>& all) {
  std::vector<const T*> distinct;
  std::unordered_set<const T*> seen;
  for (const T* one : all) {
    if (seen.insert(one).second) distinct.push_back(one);
  }
  return distinct;
}

}  // namespace

std::shared_ptr<PackedIndex> PackedIndex::Of(ShardIndex index) {
  auto packed = std::make_shared<PackedIndex>();
  std::vector<uint32_t> places;  // Of the pieces themselves, behind their names.
  places.reserve(index.pieces.size());
  for (const TensorPiece& piece : index.pieces) {
    places.push_back(static_cast<uint32_t>(packed->entries.size() + 2 + piece.name.size()));
    PackPiece(packed->entries, piece);
  }
  for (const PieceAlias& alias : index.aliases) {
    PackText(packed->entries, alias.name);
    packed->entries.push_back(kAlias);
    PackNumber(packed->entries, places[alias.piece]);
  }
  packed->entries.shrink_to_fit();
  packed->count = static_cast<uint32_t>(index.pieces.size() + index.aliases.size());
  packed->data_bytes = index.data_bytes;
  index.expected.ShrinkToFit();
  packed->expected = std::make_shared<const TextList>(std::move(index.expected));
  return packed;
}

Status CheckCoverage(const std::vector<const PackedIndex*>& ranks) {
  // Ranks with equal structure hashes share one index; its pieces count once, like any repeated piece.
  const std::vector<const PackedIndex*> distinct = Distinct(ranks);
  const ByName by_name(distinct);
  SP_RETURN_IF_ERROR(CheckTensors(by_name));
  std::vector<const TextList*> lists;
  for (const PackedIndex* rank : distinct) lists.push_back(rank->expected.get());
  const TextList* checked = nullptr;
  for (const TextList* list : Distinct(lists)) {
    if (checked && *checked == *list) continue;  // The usual case: all ranks agreed on one list.
    for (const std::string_view name : *list) {
      if (!by_name.Contains(name)) return {StatusCode::kIncomplete, "tensor " + std::string(name) + ": no rank holds it"};
    }
    checked = list;
  }
  return {};
}

}  // namespace sp
