// Seal records and copy reports (T-5). Properties: what decodes encodes to the same bytes, and its attempt is the hash of its key. Checksum and
// attempt are also set right, to get behind them.
#include <algorithm>

#include "base/crc32c.h"
#include "format/fixed_layout.h"
#include "format/seal_record.h"
#include "fuzz.h"

namespace {

using namespace sp;

template <typename T>
void Check(ByteSpan bytes) {
  const auto value = T::Decode(bytes);
  if (!value) {
    SP_CHECK(value.error().code() == StatusCode::kProtocol);
    return;
  }
  SP_CHECK(std::ranges::equal(value->Encode(), bytes));
  if constexpr (std::is_same_v<T, SealRecord>) {
    SP_CHECK(value->attempt == value->key.AttemptId());
    SP_CHECK(value->world_size > value->rank && value->static_offset <= value->header_bytes && value->header_bytes <= value->length_bytes);
  }
}

template <typename T>
void SetChecksum(std::vector<uint8_t>& bytes) {
  layout::Put(bytes, T::kBytes - 4, Crc32c(0, ByteSpan(bytes).first(T::kBytes - 4)));
}

template <typename T>
void Try(ByteSpan bytes) {
  Check<T>(bytes);
  if (bytes.size() < T::kBytes) return;
  std::vector<uint8_t> fixed(bytes.begin(), bytes.begin() + T::kBytes);
  SetChecksum<T>(fixed);
  Check<T>(fixed);
  if constexpr (std::is_same_v<T, SealRecord>) {  // Its fields as docs/formats/seal-record.md places them.
    AttemptKey key;
    key.nonce = layout::GetFixed<16>(fixed, 24);
    key.generation = layout::Get<uint64_t>(fixed, 40);
    key.step = layout::Get<uint64_t>(fixed, 48);
    key.try_number = layout::Get<uint32_t>(fixed, 56);
    key.uid = layout::Get<uint32_t>(fixed, 60);
    key.ns = AsText(ByteSpan(fixed).subspan(102, std::min<size_t>(layout::Get<uint16_t>(fixed, 100), 200)));
    layout::Put(fixed, 8, key.AttemptId());
    SetChecksum<T>(fixed);
    Check<T>(fixed);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Try<SealRecord>({data, size});
  Try<CopyReport>({data, size});
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  SealRecord r;
  r.key.ns = "run";
  r.key.step = 10;
  r.attempt = r.key.AttemptId();
  r.world_size = 8;
  r.rank = 3;
  r.length_bytes = 10000;
  r.header_bytes = 8192;
  r.static_offset = 4096;
  std::vector<Input> seeds = {AsInput(r.Encode()), AsInput(CopyReport{}.Encode())};
  const auto with = [&](auto change) {
    SealRecord other = r;
    change(other);
    other.attempt = other.key.AttemptId();
    seeds.push_back(AsInput(other.Encode()));
  };
  with([](SealRecord& x) { x.kind = ShardKind::kManifest, x.rank = 0, x.header_bytes = x.static_offset = 0; });
  with([](SealRecord& x) { x.kind = ShardKind::kManifest; });
  with([](SealRecord& x) { x.kind = static_cast<ShardKind>(7); });
  with([](SealRecord& x) { x.world_size = 0; });
  with([](SealRecord& x) { x.world_size = 70000; });
  with([](SealRecord& x) { x.rank = 8; });
  with([](SealRecord& x) { x.key.step = UINT64_MAX; });
  with([](SealRecord& x) { x.length_bytes = UINT64_MAX; });
  with([](SealRecord& x) { x.header_bytes = UINT64_MAX; });
  with([](SealRecord& x) { x.header_bytes = 20000; });
  with([](SealRecord& x) { x.static_offset = 8193; });
  with([](SealRecord& x) { x.key.ns = ""; });
  with([](SealRecord& x) { x.key.ns = "../etc"; });
  with([](SealRecord& x) { x.key.ns = std::string("a\0b", 3); });
  with([](SealRecord& x) { x.key.ns = std::string(200, 'a'); });
  Input bad = seeds[0];
  bad[4] = 9;
  seeds.push_back(bad);
  bad = seeds[0];
  bad[100] = 201;
  seeds.push_back(bad);
  for (const size_t padding : {7, 110, 302, 370}) {
    bad = seeds[0];
    bad[padding] = 1;
    seeds.push_back(bad);
  }
  bad = seeds[1];
  bad[6] = 2;
  seeds.push_back(bad);
  bad = seeds[1];
  bad[80] = 2;
  seeds.push_back(bad);
  seeds.push_back(Input(seeds[0].begin(), seeds[0].end() - 1));
  seeds.push_back(Input(5, 'S'));
  return seeds;
}
