// Frames of the socket protocol and every body, both directions, and the frames between worker and keeper (T-1).
// Properties: what decodes encodes to the same bytes; decoding allocates in proportion to the input.
#include "format/messages.h"
#include "fuzz.h"
#include "node/keeper_protocol.h"

namespace {

using namespace sp;

// A list's vector grows by doubling, so a few times an element's size for each of its bytes; error texts come on top.
constexpr size_t kBytesPerByteMax = 32, kBytesBesideMax = 4096;

template <typename T>
void TryBody(ByteSpan bytes) {
  fuzz::AllocationMeter meter;
  const auto body = Decode<T>(bytes);
  SP_CHECK(meter.bytes() <= kBytesPerByteMax * bytes.size() + kBytesBesideMax);
  if (!body) {
    SP_CHECK(body.error().code() == StatusCode::kProtocol);
    return;
  }
  const std::vector<uint8_t> again = Encode(*body);
  SP_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
}
template <typename... T>
void TryBodies(ByteSpan bytes) {
  (TryBody<T>(bytes), ...);
}

void TryFrame(ByteSpan bytes) {
  const auto frame = Frame::Decode(bytes);
  if (!frame) {
    SP_CHECK(frame.error().code() == StatusCode::kProtocol);
    return;
  }
  const std::vector<uint8_t> again = frame->Encode();
  SP_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  const Status status = frame->ToStatus();
  SP_CHECK(status.code() == frame->status);
  // An error made of it fits into a frame again, whatever its text.
  SP_CHECK(Frame::Decode(Frame::Error(frame->type, frame->request_id, status).Encode()).has_value());
  if (const auto info = Decode<AttemptInfo>(frame->body)) SP_CHECK(AttemptStateName(info->state) != "unknown" && LevelName(info->level) != "unknown");
}

void TryKeeperFrame(ByteSpan bytes) {
  if (const auto frame = DecodeKeeperFrame(bytes)) {
    const auto again = EncodeKeeperFrame(*frame);
    SP_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  }
}

template <typename T>
fuzz::Input Seed(MessageType type, const T& body) {
  return MakeFrame(type, 1, body).Encode();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ByteSpan bytes(data, size);
  TryFrame(bytes);
  TryKeeperFrame(bytes);
  if (size == 1) {  // A reply that grew beyond what a message holds says so instead.
    Frame large;
    large.body.assign(kFrameBytesMax - Frame::kHeaderBytes + data[0], data[0]);
    const auto sent = Frame::Decode(large.Encode());
    SP_CHECK(sent && sent->status == (data[0] == 0 ? StatusCode::kOk : StatusCode::kLimit));
    large.body.resize(kFrameBytesMax);
    SP_CHECK(!Frame::Decode(large.body).has_value());  // As a message it is too long by its header.
    large.body.push_back(0);
    SP_CHECK(!Frame::Decode(large.body).has_value());
  }
  if (size < Frame::kHeaderBytes) return 0;
  TryBodies<Empty, AttemptInfo, HelloRequest, HelloReply, OpenGenerationRequest, OpenGenerationReply, PrepareSlotsRequest, PrepareSlotsReply,
            ReserveRequest, ReserveReply, FetchExtentsRequest, FetchExtentsReply, SealRequest, SealReply, LeaseRequest, WaitRequest, WaitReply,
            NamespaceRequest, ListStepsReply, ListNamespacesReply, OpenReadRequest, OpenReadReply, ShardRequest, ShardInfoReply,
            ReportCorruptReply, PinRequest, PinStepRequest, StatusReply>(bytes.subspan(Frame::kHeaderBytes));
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  HelloRequest hello;
  hello.client_name = "trainer";
  HelloReply welcome;
  welcome.daemon_version = "0.1.0";
  OpenGenerationRequest open;
  open.ns = "run";
  PrepareSlotsRequest prepare;
  prepare.ns = "run";
  PrepareSlotsReply slots;
  slots.slots = {{1, 2}, {3, 4}};
  ReserveRequest reserve;
  reserve.ns = "run";
  ReserveReply reserved;
  reserved.gone_slots = {1, 2, 3};
  LeaseRequest lease{7, "out of memory"};
  WaitRequest wait;
  wait.ns = "run";
  NamespaceRequest name;
  name.ns = "run";
  AttemptInfo info;
  info.reason = "rank 3 aborted";
  ListStepsReply steps;
  steps.attempts = {info, info};
  ListNamespacesReply namespaces;
  namespaces.namespaces = {{"run", 1, 2, 3}, {"other", 1, 2, 3}};
  OpenReadRequest read;
  read.ns = "run";
  PinStepRequest pin;
  pin.ns = "run";
  StatusReply status{"{\"pool\":{}}"};
  std::vector<Input> seeds = {
      Seed(MessageType::kHello, hello), Seed(MessageType::kHello, welcome), Seed(MessageType::kOpenGeneration, open),
      Seed(MessageType::kOpenGeneration, OpenGenerationReply{}), Seed(MessageType::kPrepareSlots, prepare), Seed(MessageType::kPrepareSlots, slots),
      Seed(MessageType::kReserve, reserve), Seed(MessageType::kReserve, reserved), Seed(MessageType::kFetchExtents, FetchExtentsRequest{}),
      Seed(MessageType::kFetchExtents, FetchExtentsReply{}), Seed(MessageType::kSeal, SealRequest{}), Seed(MessageType::kSeal, SealReply{}),
      Seed(MessageType::kAbort, lease), Seed(MessageType::kWait, wait), Seed(MessageType::kWait, WaitReply{}), Seed(MessageType::kLatest, name),
      Seed(MessageType::kLatest, info), Seed(MessageType::kListSteps, steps), Seed(MessageType::kListNamespaces, namespaces),
      Seed(MessageType::kOpenRead, read), Seed(MessageType::kOpenRead, OpenReadReply{}), Seed(MessageType::kShardInfo, ShardRequest{}),
      Seed(MessageType::kShardInfo, ShardInfoReply{}), Seed(MessageType::kReportCorrupt, ReportCorruptReply{}), Seed(MessageType::kUnpin, PinRequest{}),
      Seed(MessageType::kPinStep, pin), Seed(MessageType::kStatus, status), Seed(MessageType::kBye, Empty{}),
      Frame::Error(MessageType::kWait, 1, Status(StatusCode::kDeadline, "late")).Encode()};
  // Bad ones: a list and a text of 2^32-1, one more than is left, an unknown type, another version, every way to be too short.
  const Input list = Seed(MessageType::kPrepareSlots, slots);
  for (const uint32_t count : {0xffffffffu, 3u, 0u}) {
    Input bad = list;
    std::memcpy(bad.data() + Frame::kHeaderBytes, &count, sizeof count);
    seeds.push_back(bad);
  }
  Input text = Seed(MessageType::kAbort, lease);
  for (size_t i = 0; i < 4; ++i) text[Frame::kHeaderBytes + 8 + i] = 0xff;
  seeds.push_back(text);
  Input odd = seeds[0];
  odd[6] = 0xff;
  seeds.push_back(odd);
  odd = seeds[2];
  odd[4] = 9;
  seeds.push_back(odd);
  for (size_t n : {0, 1, 23, 24, 25, 40}) seeds.push_back(Input(seeds[6].begin(), seeds[6].begin() + static_cast<std::ptrdiff_t>(n)));
  for (const KeeperCommand command : {KeeperCommand::kAttach, KeeperCommand::kCreateExtents, KeeperCommand::kAttached, KeeperCommand::kDropped}) {
    KeeperFrame frame;
    frame.command = command;
    seeds.push_back(AsInput(EncodeKeeperFrame(frame)));
  }
  return seeds;
}
