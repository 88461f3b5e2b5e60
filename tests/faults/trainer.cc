// The trainer of the campaign (fail_nth.py): saves and restores through the client library while calls fail, and says what it saw.
//
//   fault_trainer layout                         the control block, for the campaign
//   fault_trainer save|restore|restart SOCKET BASE KEEPER DEADLINE_MS STOP_EARLY
//   fault_trainer start SOCKET BASE 0 DEADLINE_MS STOP_EARLY DAEMON FLAG...
//   fault_trainer check SOCKET BASE              every listed step verified, a new one saved
//   fault_trainer status SOCKET 0                the daemon's status
//
// One line per event on stdout: ok WHAT | error WHAT CODE MESSAGE | acked STEP | violation WHAT | status JSON | done. Nothing of this
// program allocates or calls the system while faults are armed, except through the library, so that every failure is the library's.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "client/client.h"
#include "fail_nth.h"
#include "format/fixed_layout.h"
#include "os/files.h"
#include "os/memfd.h"
#include "os/system.h"

namespace sp {
namespace {

constexpr uint64_t kTensors = 5;
constexpr uint64_t kTensorBytes = 1'048'000;  // So that no tensor ends with a block.
constexpr uint64_t kPartBytes = 4096;         // Of the header's two parts.
constexpr uint64_t kHeaderBytes = 2 * kPartBytes;
constexpr uint64_t kLength = kHeaderBytes + kTensors * kTensorBytes;
constexpr char kNamespace[] = "faults";
constexpr Nanos kPatience = 15 * kNanosPerSecond;  // With nothing failing any more.

// What happened, in memory of our own until nothing fails any more.
class Events {
 public:
  __attribute__((format(printf, 2, 3))) void Add(const char* format, ...) {
    va_list list;
    va_start(list, format);
    const int size = std::vsnprintf(text_ + used_, sizeof text_ - used_, format, list);
    va_end(list);
    // One line per event, whatever a message holds.
    for (int i = 0; i + 1 < size && used_ + i < sizeof text_; ++i) {
      if (text_[used_ + i] == '\n') text_[used_ + i] = ' ';
    }
    used_ = std::min(used_ + static_cast<size_t>(std::max(size, 0)), sizeof text_ - 1);
  }
  void Print() {
    std::fwrite(text_, 1, used_, stdout);
    std::fflush(stdout);
    used_ = 0;
  }

 private:
  char text_[1 << 18];
  size_t used_ = 0;
};

Events events;
FailNth* control = nullptr;

void Arm(bool on) {
  if (control != nullptr) __atomic_store_n(&control->armed, on ? 1 : 0, __ATOMIC_RELEASE);
}

// An error must be one that a person can act on.
bool Note(const char* what, const Status& status) {
  if (status.ok()) {
    events.Add("ok %s\n", what);
    return true;
  }
  const std::string_view code = StatusCodeName(status.code());
  events.Add("error %s %.*s %s\n", what, static_cast<int>(code.size()), code.data(), status.message().c_str());
  if (status.message().empty()) events.Add("violation %s: no clear error\n", what);
  return false;
}
template <typename T>
bool Note(const char* what, const Result<T>& result) {
  return result ? Note(what, Status()) : Note(what, result.error());
}
template <typename T>
bool Note(const char* what, const ReadResult<T>& result) {
  return result ? Note(what, Status()) : Note(what, result.error().status);
}
template <typename T>
void Must(const char* what, const T& result) {
  if (!Note(what, result)) events.Add("violation %s failed although nothing fails any more\n", what);
}

// Every word names step and place.
uint64_t Word(uint64_t step, uint64_t index) { return step * 0x9e3779b97f4a7c15 ^ index * 0xc2b2ae3d27d4eb4f; }

struct Shard {
  explicit Shard(uint64_t step) : step(step), bytes(kLength) {
    const auto put = [this](uint64_t at, std::string text) {
      text.resize(kPartBytes, ' ');
      std::memcpy(bytes.data() + at, text.data(), text.size());
    };
    std::string dynamic(8, '\0');
    put(0, dynamic + R"({"__metadata__":{"safepoint.step":"{}","safepoint.objects":"[]")");
    std::string offsets, tensors;
    for (uint64_t i = 0; i < kTensors; ++i) {
      const std::string name = "w" + std::to_string(i), comma = i == 0 ? "" : ",";
      offsets += comma + "\\\"" + name + "\\\":{\\\"saved_offsets\\\":[0]}";
      tensors += ",\"" + name + R"(":{"dtype":"U8","shape":[)" + std::to_string(kTensorBytes) + R"(],"data_offsets":[)" +
                 std::to_string(i * kTensorBytes) + "," + std::to_string((i + 1) * kTensorBytes) + "]}";
    }
    put(kPartBytes, R"(,"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":"{)" + offsets + R"(}","safepoint":"{\"version\":1}"})" +
                        tensors + "}");
    layout::Put<uint64_t>(bytes, 0, kHeaderBytes - 8);
    for (uint64_t at = kHeaderBytes; at < kLength; at += 8) layout::Put<uint64_t>(bytes, at, Word(step, at));
    seal.static_offset = kPartBytes;
    seal.structure = Sha256(ByteSpan(bytes).subspan(kPartBytes, kPartBytes));
    seal.threads = 2;
    for (uint64_t i = 0; i < kTensors; ++i) {
      const uint64_t at = kHeaderBytes + i * kTensorBytes;
      segments.push_back({bytes.data() + at, at, kTensorBytes});
    }
  }
  ByteSpan header() const { return ByteSpan(bytes).first(kHeaderBytes); }

  uint64_t step;
  std::vector<uint8_t> bytes;
  SealInfo seal;
  std::vector<CopySegment> segments;
};

struct Target {
  Target() : bytes(kLength) {
    for (uint64_t i = 0; i < kTensors; ++i) {
      const uint64_t at = kHeaderBytes + i * kTensorBytes;
      segments.push_back({at, kTensorBytes, bytes.data() + at});
    }
  }
  bool HasStep(uint64_t step) const {
    for (uint64_t at = kHeaderBytes; at < kLength; at += 8) {
      if (layout::Get<uint64_t>(bytes, at) != Word(step, at)) return false;
    }
    return true;
  }

  std::vector<uint8_t> bytes;
  std::vector<ScatterSegment> segments;
};

ClientOptions Options(const std::string& socket, Nanos timeout) {
  return {.socket_path = socket, .client_name = "fault_trainer", .start = {}, .timeout = timeout};
}

struct Job {
  OpenGenerationRequest open;
  ReserveOptions reserve;
  OpenReadRequest read;
  const std::string ns = kNamespace;
  bool opened = false;

  Job() {
    open.ns = reserve.ns = read.ns = kNamespace;
    open.nonce = reserve.nonce = RandomId128();
    open.world_size = reserve.world_size = 1;
    reserve.length = kLength;
  }

  bool OpenGeneration(Client& client, Nanos timeout) {
    const auto generation = client.OpenGeneration(open, timeout);
    if (generation) reserve.generation = generation->generation;
    return opened = Note("open_generation", generation);
  }

  bool Save(Client& client, Shard& shard, Nanos timeout) {
    reserve.step = shard.step;
    const auto lease = client.Reserve(reserve, timeout);
    if (!Note("reserve", lease)) return false;
    const auto transfer = (*lease)->Start(shard.header(), std::move(shard.segments), shard.seal);
    if (!Note("start", transfer)) return false;
    const Nanos deadline = MonotonicNow() + timeout;
    // Not to return before the source is free: the copy itself waits for nobody, so it always ends.
    const Status copied = transfer->WaitCopied(MonotonicNow() + kPatience);
    if (copied.code() == StatusCode::kDeadline) events.Add("violation the copy hangs\n");
    if (!Note("copy", copied) || !Note("seal", transfer->WaitSealed(deadline))) return false;
    const auto level = client.Wait(ns, (*lease)->attempt(), Level::kMemory, timeout);
    if (!Note("wait", level)) return false;
    events.Add("acked %llu\n", static_cast<unsigned long long>(shard.step));
    return true;
  }

  bool Read(Client& client, Target& target, int file) {
    const auto pin = client.OpenRead(read);
    if (!Note("open_read", pin)) return false;
    const auto shard = (*pin)->Shard(0);
    if (!Note("shard", shard)) return false;
    const bool header = Note("header", (*shard)->Header());
    const bool bytes = Note("read", (*shard)->Read(target.segments, 2));
    if (bytes && !target.HasStep((*pin)->info().step)) events.Add("violation wrong bytes were returned as step %llu\n",
                                                                  static_cast<unsigned long long>((*pin)->info().step));
    const auto all = (*shard)->Verify(0, (*shard)->blocks());
    const auto one = (*shard)->Verify(0, 1);
    Note("verify", all);
    Note("verify_one", one);
    if ((all && !all->empty()) || (one && !one->empty())) events.Add("violation good blocks were called corrupt\n");
    if (file >= 0) Note("copy_to_file", (*shard)->CopyToFile(file));
    return header && bytes;
  }
};

int CountEntries(const char* folder) {
  DIR* const dir = ::opendir(folder);
  int count = 0;
  while (dir != nullptr && ::readdir(dir) != nullptr) ++count;
  ::closedir(dir);
  return count;
}

// The library leaves nothing in this process once its client is gone.
void CheckNothingLeft(int fds_before) {
  const int fds = CountEntries("/proc/self/fd");
  if (fds != fds_before) events.Add("violation %d descriptors leaked\n", fds - fds_before);
  // A thread that was joined is gone from this list a moment later; no event tells.
  const Nanos give_up = MonotonicNow() + kPatience;
  int threads = CountEntries("/proc/self/task") - 2;
  while (threads != 1 && MonotonicNow() < give_up) {
    ::usleep(1000);
    threads = CountEntries("/proc/self/task") - 2;
  }
  if (threads != 1) events.Add("violation %d threads are left\n", threads - 1);
  const auto maps = ReadFile("/proc/self/maps", 1 << 22);
  const bool kept = control != nullptr && control->role == FAIL_NTH_TRAINER && control->function == FAIL_NTH_munmap;
  if (!maps || (maps->find("memfd:safepoint") != std::string::npos && !kept)) events.Add("violation a slot is still mapped\n");
}

pid_t WorkerOf(pid_t keeper) {
  const std::string self = std::to_string(keeper);
  const auto children = ReadFile("/proc/" + self + "/task/" + self + "/children", 4096);
  return children ? static_cast<pid_t>(std::atol(children->c_str())) : 0;
}

struct Arguments {
  std::string scenario, socket;
  uint64_t base = 0;
  pid_t keeper = 0;
  Nanos deadline = 0;
  bool stop_early = false;  // After the first error the rest of the armed part is not worth its waiting.
  std::vector<std::string> daemon;
};

void Play(const Arguments& arguments) {
  const bool restart = arguments.scenario == "restart", restore = arguments.scenario == "restore";
  ClientOptions options = Options(arguments.socket, arguments.deadline);
  if (!arguments.daemon.empty()) {
    options.timeout = std::max(options.timeout, 3 * kNanosPerSecond);  // A process starts meanwhile.
    options.start = StartOptions{.daemon_path = arguments.daemon[0],
                                 .arguments = {arguments.daemon.begin() + 1, arguments.daemon.end()},
                                 .lock_path = arguments.socket + ".lock",
                                 .log_path = arguments.socket + ".log"};
  }
  Job job;
  Target target;
  std::vector<Shard> shards;
  for (uint64_t i = 1; i <= 4; ++i) shards.emplace_back(arguments.base + i);
  for (Shard& shard : shards) {  // Their bytes moved.
    for (CopySegment& segment : shard.segments) segment.source = shard.bytes.data() + segment.offset;
  }
  const Fd file = CreateMemfd("copy", 0).value();
  const int fds_before = CountEntries("/proc/self/fd");
  std::unique_ptr<Client> client;
  const auto connect = [&] {
    auto connected = Client::Connect(options);
    if (!Note("connect", connected)) return false;
    client = std::move(*connected);
    return true;
  };

  if (restart) {
    if (!connect() || !job.OpenGeneration(*client, kPatience) || !job.Save(*client, shards[0], kPatience)) {
      events.Add("violation the calm before the faults\n");
      return;
    }
    const bool ours = control == nullptr || control->role == FAIL_NTH_TRAINER;
    const pid_t worker = WorkerOf(arguments.keeper);
    if (!ours) Arm(true);  // The worker's start is part of it.
    if (worker <= 0 || ::kill(worker, SIGKILL) != 0) events.Add("violation no worker to kill\n");
  }
  Arm(true);
  const bool connected = client != nullptr || connect();
  if (connected && (restore || restart)) {
    const bool carry_on = !restart || job.Save(*client, shards[1], arguments.deadline) || !arguments.stop_early;
    if (carry_on) job.Read(*client, target, file.get());
  }
  if (connected && !restore && !restart) {
    if (job.OpenGeneration(*client, arguments.deadline)) {
      bool fine = Note("prepare", client->PrepareSlots(job.ns, kLength, 1, arguments.deadline));
      fine = (fine || !arguments.stop_early) && job.Save(*client, shards[0], arguments.deadline);
      if (fine || !arguments.stop_early) job.Save(*client, shards[1], arguments.deadline);
      Note("latest", client->Latest(job.ns));
      Note("status", client->StatusJson());
    }
  }
  Arm(false);

  // The same client is as good as new.
  if (client != nullptr) {
    if (!job.opened && !job.OpenGeneration(*client, kPatience)) events.Add("violation the client was spoilt\n");
    if (!job.Save(*client, shards[2], kPatience)) events.Add("violation the client was spoilt\n");
    if (!job.Read(*client, target, file.get())) events.Add("violation the client was spoilt\n");
    // Going away while calls fail: with an open lease and an open read.
    job.reserve.step = shards[3].step;
    auto lease = client->Reserve(job.reserve, kPatience);
    Must("reserve", lease);
    auto pin = client->OpenRead(job.read);
    Must("open_read", pin);
    auto shard = pin ? (*pin)->Shard(0) : ReadResult<std::unique_ptr<ShardReader>>(std::unexpected(pin.error()));
    Must("shard", shard);
    if (control != nullptr && control->role == FAIL_NTH_TRAINER) Arm(true);
    if (shard) shard->reset();
    if (pin) pin->reset();
    if (lease) lease->reset();
    client->Close(arguments.deadline);
    client.reset();
    Arm(false);
  }
  CheckNothingLeft(fds_before);
}

void Check(const Arguments& arguments) {
  auto connected = Client::Connect(Options(arguments.socket, kPatience));
  const Nanos give_up = MonotonicNow() + kPatience;
  while (!connected && MonotonicNow() < give_up) {
    ::usleep(5000);  // Nobody listens yet; no event tells.
    connected = Client::Connect(Options(arguments.socket, kPatience));
  }
  Must("connect", connected);
  if (!connected) return;
  Client& client = **connected;
  Job job;
  Target target;
  const auto steps = client.ListSteps(kNamespace);
  if (steps) {
    for (const AttemptInfo& info : *steps) {
      if (info.state != AttemptState::kComplete) continue;
      events.Add("listed %llu\n", static_cast<unsigned long long>(info.step));
      OpenReadRequest request;
      request.ns = kNamespace;
      request.choice = ReadChoice::kAttempt;
      request.attempt = info.attempt;
      const auto pin = client.OpenRead(request);
      Must("open_read", pin);
      if (!pin) continue;
      const auto shard = (*pin)->Shard(0);
      Must("shard", shard);
      if (!shard) continue;
      Must("read", (*shard)->Read(target.segments, 1));
      if (!target.HasStep(info.step)) events.Add("violation step %llu has other bytes\n", static_cast<unsigned long long>(info.step));
    }
  } else if (steps.error().code() != StatusCode::kNotFound) {
    Must("list", steps);
  }
  Shard shard(arguments.base);
  if (!job.OpenGeneration(client, kPatience) || !job.Save(client, shard, kPatience)) events.Add("violation a new save fails\n");
}

void ShowStatus(const Arguments& arguments) {
  const auto client = Client::Connect(Options(arguments.socket, kPatience));
  Must("connect", client);
  if (!client) return;
  const auto status = (*client)->StatusJson();
  Must("status", status);
  if (status) events.Add("status %s\n", status->c_str());
}

void PrintLayout() {
  std::printf("{\"size\":%zu,\"magic\":%u,\"armed\":%zu,\"role\":%zu,\"function\":%zu,\"error\":%zu,\"from_then_on\":%zu,\"n\":%zu,"
              "\"calls\":%zu,\"injected\":%zu,\"profile\":%zu,\"site\":%zu,\"depth\":%d,\"functions\":[",
              sizeof(FailNth), FAIL_NTH_MAGIC, offsetof(FailNth, armed), offsetof(FailNth, role), offsetof(FailNth, function),
              offsetof(FailNth, error), offsetof(FailNth, from_then_on), offsetof(FailNth, n), offsetof(FailNth, calls),
              offsetof(FailNth, injected), offsetof(FailNth, profile), offsetof(FailNth, site), FAIL_NTH_SITE_DEPTH);
  const char* comma = "";
#define PRINT(name) std::printf("%s\"%s\"", comma, #name), comma = ",";
  FAIL_NTH_FUNCTIONS(PRINT)
#undef PRINT
  std::printf("]}\n");
}

void MapControl() {
  const char* const path = std::getenv(FAIL_NTH_FILE);
  if (path == nullptr) return;
  const Fd fd(::open(path, O_RDWR | O_CLOEXEC));
  void* const mapped = ::mmap(nullptr, sizeof(FailNth), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (mapped == MAP_FAILED) std::abort();
  control = static_cast<FailNth*>(mapped);
}

int Main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() == 1 && words[0] == "layout") return PrintLayout(), 0;
  if (words.size() < 3) return std::fprintf(stderr, "usage: see the head of trainer.cc\n"), 2;
  Arguments arguments{.scenario = words[0], .socket = words[1], .base = std::stoull(words[2])};
  if (arguments.scenario == "check") {
    Check(arguments);
  } else if (arguments.scenario == "status") {
    ShowStatus(arguments);
  } else {
    if (words.size() < 6) return std::fprintf(stderr, "usage: see the head of trainer.cc\n"), 2;
    arguments.keeper = static_cast<pid_t>(std::stol(words[3]));
    arguments.deadline = std::stoll(words[4]) * kNanosPerMilli;
    arguments.stop_early = words[5] == "1";
    arguments.daemon.assign(words.begin() + 6, words.end());
    MapControl();
    try {
      Play(arguments);
    } catch (const std::exception& error) {
      Arm(false);
      events.Add("violation an exception left the library: %s\n", error.what());
    }
  }
  events.Add("done\n");
  events.Print();
  return 0;
}

}  // namespace
}  // namespace sp

int main(int argc, char** argv) { return sp::Main(argc, argv); }
