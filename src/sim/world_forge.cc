// Well-formed messages that no client sends: seals of other processes' leases, generations of other launches, pins of strangers. What the sender
// promises by one (to write no more, to read no more), it keeps, because the model believes it.
#include <algorithm>

#include "sim/world.h"

namespace sp::sim {
namespace {

// Reads one number as a list of choices.
class Choices {
 public:
  explicit Choices(uint32_t value) : value_(value) {}
  uint32_t Below(uint32_t n) {
    const uint32_t choice = value_ % n;
    value_ /= n;
    return choice;
  }
  // Any key of the map, or one that is in none.
  template <typename K, typename V>
  K KeyOf(const std::map<K, V>& map) {
    const uint32_t at = Below(static_cast<uint32_t>(std::min<size_t>(map.size(), 15)) + 1);
    return at == map.size() || at == 15 ? K{} : std::next(map.begin(), at)->first;
  }

 private:
  uint32_t value_;
};

}  // namespace

void World::Forge(size_t p, uint32_t arg) {
  Process& process = processes_[p];
  Choices choose(arg);
  Frame frame;
  frame.type = static_cast<MessageType>(1 + choose.Below(static_cast<uint32_t>(kMessageTypeLast)));
  frame.request_id = 2'000'000;
  const NamespaceKey ns = NamespaceAt(choose.Below(4));
  const uint64_t extent_bytes = node_.config().extent_bytes;
  const auto nonce = [&] { return launches_.empty() ? Id128{} : launches_[launches_.size() - 1 - choose.Below(4) % launches_.size()].nonce; };
  const auto bytes = [&] {
    const uint64_t sizes[] = {LeaseBytes(extent_bytes - 4096), 1, 3 * extent_bytes, UINT64_MAX};
    return sizes[choose.Below(4)];
  };
  const auto seconds = [&] { return uint64_t{choose.Below(3)} * 20 * kNanosPerSecond; };
  const auto own_pin = [&](uint64_t pin) { return model_.pins().contains(pin) && model_.pins().at(pin).entry.session.session == process.key.session; };
  switch (frame.type) {
    case MessageType::kHello: {
      HelloRequest r;
      r.session = processes_[choose.Below(24) % processes_.size()].key.session;
      r.version_max = static_cast<uint16_t>(kProtocolVersion - (choose.Below(8) == 0));
      frame.body = Encode(r);
      break;
    }
    case MessageType::kOpenGeneration: {
      const uint32_t world = 1 + choose.Below(3), rank = choose.Below(4);
      const auto mode = static_cast<ParentMode>(choose.Below(3));
      frame.body = Encode(OpenGenerationRequest{ns.ns, nonce(), world, rank, mode, choose.KeyOf(model_.attempts())});
      break;
    }
    case MessageType::kPrepareSlots: {
      const uint32_t counts[] = {0, 1, 2, UINT32_MAX};
      frame.body = Encode(PrepareSlotsRequest{ns.ns, bytes(), seconds(), counts[choose.Below(4)]});
      break;
    }
    case MessageType::kReserve: {
      const uint64_t steps[] = {0, 10, 20, 30, 40, 50, kStepMax + 1, UINT64_MAX};
      const uint64_t generation = model_.CurrentGeneration(ns) + 1 - choose.Below(3);
      const uint64_t step = steps[choose.Below(8)];
      const uint32_t world = choose.Below(4), rank = choose.Below(4);
      frame.body = Encode(ReserveRequest{ns.ns, generation, nonce(), step, choose.Below(2), world, rank, bytes(), seconds()});
      break;
    }
    case MessageType::kFetchExtents: {
      const bool read_only = choose.Below(2) == 1;
      const uint32_t first = choose.Below(3) == 2 ? UINT32_MAX : choose.Below(2), rank = choose.Below(4);
      frame.body = Encode(FetchExtentsRequest{read_only, choose.KeyOf(model_.slots()), choose.KeyOf(model_.pins()), rank, first});
      break;
    }
    case MessageType::kSeal: {
      SealRequest r;
      r.lease = choose.KeyOf(model_.leases());
      const uint64_t lengths[] = {extent_bytes - 4096, 4096, 0, UINT64_MAX};
      r.length_bytes = lengths[choose.Below(4)];
      r.header_bytes = r.length_bytes - (choose.Below(4) == 3 ? 5 : 4);
      r.static_offset = choose.Below(8) == 7 ? UINT64_MAX : 32;
      const auto lease = model_.leases().find(r.lease);
      if (lease != model_.leases().end()) {
        const auto slot = model_.slots().find(lease->second.slot);
        std::vector<MemoryRef> memory;
        if (slot != model_.slots().end()) {
          for (uint32_t id : slot->second.entry.extents) memory.push_back(node_.FindExtent(id));
          if (slot->second.entry.session.session == process.key.session && process.save.lease == r.lease) process.save.phase = Save::Phase::kNone;
        }
        const size_t count = r.length_bytes == UINT64_MAX ? 0 : std::min<size_t>(memory.size(), ExtentsFor(r.length_bytes, extent_bytes));
        const bool all = std::find(memory.begin(), memory.end(), nullptr) == memory.end();
        if (all && choose.Below(4) != 3) r.block_root = RootOf(memory, count);
        r.structure = StructureOf(lease->second.world_size, lease->second.rank, choose.Below(4) == 3);
      }
      frame.body = Encode(r);
      break;
    }
    case MessageType::kAbort:
    case MessageType::kRenew: {
      const uint64_t id = choose.KeyOf(model_.leases());
      const auto lease = model_.leases().find(id);
      if (frame.type == MessageType::kAbort && lease != model_.leases().end()) {
        const auto slot = model_.slots().find(lease->second.slot);
        if (slot != model_.slots().end() && slot->second.entry.session.session == process.key.session) {
          model_.WriterPromised(id);
          if (process.save.lease == id) process.save.phase = Save::Phase::kNone;
        }
      }
      frame.body = Encode(LeaseRequest{id, "forged"});
      break;
    }
    case MessageType::kWait: {
      const auto level = static_cast<Level>(choose.Below(4));
      frame.body = Encode(WaitRequest{ns.ns, choose.KeyOf(model_.attempts()), level, seconds()});
      break;
    }
    case MessageType::kLatest:
    case MessageType::kListSteps:
    case MessageType::kListNamespaces: {
      const auto level = static_cast<Level>(choose.Below(4));
      frame.body = frame.type == MessageType::kListNamespaces && level == Level::kNone
                       ? Encode(Empty{})
                       : Encode(NamespaceRequest{ns.ns, level, choose.Below(3) == 2 ? UINT32_MAX : choose.Below(3)});
      break;
    }
    case MessageType::kOpenRead: {
      OpenReadRequest r;
      r.ns = ns.ns;
      r.choice = static_cast<ReadChoice>(choose.Below(3));
      r.step = 10 * choose.Below(6);
      r.attempt = choose.KeyOf(model_.attempts());
      if (choose.Below(2)) r.nonce = nonce();
      r.sequence = choose.Below(2);
      frame.body = Encode(r);
      break;
    }
    case MessageType::kShardInfo:
    case MessageType::kReportCorrupt: {
      const uint64_t pin = choose.KeyOf(model_.pins());
      const uint32_t rank = choose.Below(5);
      frame.body = Encode(ShardRequest{pin, rank, choose.Below(3) == 2 ? UINT64_MAX : 0});
      break;
    }
    case MessageType::kUnpin: {
      const uint64_t pin = choose.KeyOf(model_.pins());
      if (own_pin(pin)) {
        model_.PinGivenBack(pin);
        if (process.reading.pin == pin) process.reading.done = true;
      }
      frame.body = Encode(PinRequest{pin});
      break;
    }
    case MessageType::kPinStep: {
      const Id128 attempt = choose.KeyOf(model_.attempts());
      frame.body = Encode(PinStepRequest{ns.ns, attempt, choose.Below(2) == 1});
      break;
    }
    case MessageType::kMakeDurable: frame.body = Encode(MakeDurableRequest{ns.ns, choose.KeyOf(model_.attempts())}); break;
    case MessageType::kStatus: frame.body = Encode(Empty{}); break;
    case MessageType::kBye: return SayGoodbye(p);
  }
  sockets_.at(process.connection).queue.push_back(std::move(frame));
}

}  // namespace sp::sim
