// Preloaded into keeper, worker and trainers by tests/boundaries/campaign.py: numbers their protocol events, and kills at one of them.
//
// The programs are the ones that ship. What they say to each other and to the system goes through functions of the C library, which are replaced
// here: a replacement decodes what it is about, logs "before", does the real call, logs "after". Appends to the ledger are plain stores into
// shared memory; the page that holds the commit word is write-protected, so that each store to it stops the program twice, before and after.
//
// A control file, shared by all processes of one run, has the log and the point to strike at (control.py has the same layout). Whoever reaches
// that point kills the targets with SIGKILL, waits until they are dead, and goes on if it is not one of them itself.
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "format/ledger.h"
#include "format/messages.h"
#include "node/keeper_protocol.h"

namespace sp {
namespace {

// --- the control file

constexpr uint32_t kEventsMax = 4096;
enum Target : uint32_t { kTrainer = 1, kWorker = 2 };

struct LoggedEvent {
  std::atomic<uint32_t> ready;
  uint32_t after;  // 0: before the event, 1: after it.
  char process[12];
  char label[60];
};

struct Control {
  std::atomic<uint32_t> window;    // Odd: events are recorded. Each window counts its events from 1.
  std::atomic<uint32_t> armed;     // The fields below say where to strike.
  uint32_t at_occurrence;
  uint32_t at_after;
  uint32_t targets;
  std::atomic<uint32_t> fired;
  std::atomic<uint32_t> struck;    // Targets that were alive and are dead now.
  std::atomic<uint32_t> workers;   // Started so far.
  std::atomic<int32_t> worker_pid;
  std::atomic<int32_t> trainer_pid;
  std::atomic<uint32_t> events;
  uint32_t reserved;
  char at_process[12];
  char at_label[60];
  LoggedEvent log[kEventsMax];
};
static_assert(sizeof(LoggedEvent) == 80 && offsetof(Control, log) == 120);

Control* control;
char process_name[12];
enum class Role { kNone, kKeeper, kWorker, kTrainer } role = Role::kNone;

template <typename F>
F* Real(F*, const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}
#define REAL(function) static auto* const real = Real(static_cast<decltype(&::function)>(nullptr), #function)

// --- killing

bool Kill(pid_t pid) {
  const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (pidfd < 0) return false;
  pollfd entry{.fd = pidfd, .events = POLLIN, .revents = 0};
  const bool alive = poll(&entry, 1, 0) == 0;
  if (alive) {
    kill(pid, SIGKILL);
    poll(&entry, 1, -1);
  }
  close(pidfd);
  return alive;
}

void Strike() {
  if (control->fired.exchange(1) != 0) return;
  bool self = false;
  const std::pair<uint32_t, pid_t> targets[] = {{kTrainer, control->trainer_pid.load()}, {kWorker, control->worker_pid.load()}};
  for (const auto& [bit, pid] : targets) {
    if ((control->targets & bit) == 0 || pid <= 0) continue;
    if (pid == getpid()) {
      self = true;
      control->struck |= bit;
    } else if (Kill(pid)) {
      control->struck |= bit;
    }
  }
  if (!self) return;
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

// --- events

constexpr size_t kLabelsMax = 128;
struct Counted {
  char label[60];
  uint32_t count;
};
std::array<Counted, kLabelsMax> counted;
uint32_t counted_window;
std::atomic_flag counting = ATOMIC_FLAG_INIT;

uint32_t Count(const char* label, bool again) {
  while (counting.test_and_set(std::memory_order_acquire)) {
  }
  const uint32_t window = control->window.load();
  if (window != counted_window) {
    counted = {};
    counted_window = window;
  }
  uint32_t count = 0;
  for (Counted& c : counted) {
    if (c.label[0] == 0) std::snprintf(c.label, sizeof c.label, "%s", label);
    if (std::strcmp(c.label, label) != 0) continue;
    if (!again) ++c.count;
    count = c.count;
    break;
  }
  counting.clear(std::memory_order_release);
  return count;
}

void Point(const char* label, uint32_t occurrence, bool after) {
  const uint32_t at = control->events.fetch_add(1);
  if (at < kEventsMax) {
    LoggedEvent& event = control->log[at];
    event.after = after;
    std::snprintf(event.process, sizeof event.process, "%s", process_name);
    std::snprintf(event.label, sizeof event.label, "%s", label);
    event.ready.store(1);
  }
  if (control->armed.load() == 0 || control->at_after != after || control->at_occurrence != occurrence) return;
  if (std::strcmp(control->at_process, process_name) == 0 && std::strcmp(control->at_label, label) == 0) Strike();
}

// One event: "before" when made, "after" when it goes. Outside of a window, or without a label, it is nothing.
class Event {
 public:
  explicit Event(const char* label) {
    if (label == nullptr || role == Role::kNone || control->window.load() % 2 == 0) return;
    const int err = errno;
    std::snprintf(label_, sizeof label_, "%s", label);
    occurrence_ = Count(label_, false);
    Point(label_, occurrence_, false);
    errno = err;
  }
  ~Event() {
    if (occurrence_ == 0) return;
    const int err = errno;
    Point(label_, occurrence_, true);
    errno = err;
  }
  void Forget() { occurrence_ = 0; }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

 private:
  char label_[60];
  uint32_t occurrence_ = 0;
};

// --- what a message is

constexpr std::array kMessageNames = {
    "Hello", "OpenGeneration", "PrepareSlots", "Reserve", "FetchExtents", "Seal", "Abort", "Renew", "Wait", "Latest",
    "ListSteps", "ListNamespaces", "OpenRead", "ShardInfo", "Unpin", "PinStep", "ReportCorrupt", "Status", "Bye", "MakeDurable"};
static_assert(kMessageNames.size() == static_cast<size_t>(kMessageTypeLast));

const char* KeeperCommandName(KeeperCommand command) {
  switch (command) {
    case KeeperCommand::kAttach: return "Attach";
    case KeeperCommand::kCreateExtents: return "CreateExtents";
    case KeeperCommand::kDropExtent: return "DropExtent";
    case KeeperCommand::kShutdown: return "Shutdown";
    case KeeperCommand::kAttached: return "Attached";
    case KeeperCommand::kExtents: return "Extents";
    case KeeperCommand::kExtentCreated: return "ExtentCreated";
    case KeeperCommand::kCreateFailed: return "CreateFailed";
    case KeeperCommand::kDropped: return "Dropped";
  }
  return "?";
}

template <typename T>
T Load(const uint8_t* bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes + offset, sizeof value);
  return value;
}

// False: not a message of ours. `label` has room for 60 bytes.
bool DescribeMessage(const uint8_t* bytes, size_t size, bool sending, char* label) {
  const char* verb = sending ? "sends" : "receives";
  if (size >= Frame::kHeaderBytes && Load<uint32_t>(bytes, 0) == Frame::kMagic) {
    const auto type = Load<uint16_t>(bytes, 6);
    if (type == 0 || type > kMessageNames.size()) return false;
    const bool reply = sending == (role == Role::kWorker);
    const auto status = Load<uint16_t>(bytes, 16);
    std::snprintf(label, 60, "%s %s%s", verb, kMessageNames[type - 1], !reply ? "" : status == 0 ? " reply" : " refusal");
    return true;
  }
  if (size == kKeeperFrameBytes && Load<uint32_t>(bytes, 0) == kKeeperMagic) {
    std::snprintf(label, 60, "%s %s", verb, KeeperCommandName(Load<KeeperCommand>(bytes, 6)));
    return true;
  }
  return false;
}

// What the descriptor is, in the kernel's words; empty when that cannot be told.
std::string_view KindOf(int fd, std::array<char, 160>& buffer) {
  char path[40];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(path, buffer.data(), buffer.size());
  return size < 0 ? std::string_view() : std::string_view(buffer.data(), static_cast<size_t>(size));
}
bool IsKind(int fd, std::string_view part) {
  std::array<char, 160> buffer;
  return KindOf(fd, buffer).find(part) != std::string_view::npos;
}

// --- the ledger (docs/formats/ledger.md)

#if !defined(__x86_64__)
#error "single steps over stores to the ledger are written for x86-64"
#endif

constexpr size_t kCommitOffset = 24, kAreaBytesOffset = 16, kEntryTypeOffset = 12;
constexpr uint64_t kTailMask = (uint64_t{1} << 39) - 1;
constexpr greg_t kTrapFlag = 0x100;

uint8_t* ledger_page;
std::optional<Event> stepping;  // Of the one thread that writes the ledger.

template <size_t... I>
const char* EntryName(size_t type, std::index_sequence<I...>) {
  const char* name = "unknown";
  ((type == I + 1 ? (name = std::variant_alternative_t<I, LedgerEntry>::kName, 0) : 0), ...);
  return name;
}

uint64_t CommitWord() { return __atomic_load_n(reinterpret_cast<const uint64_t*>(ledger_page + kCommitOffset), __ATOMIC_ACQUIRE); }

// The entry lies behind the tail already when the commit word is about to move: its name is known before the store.
void DescribeCommit(char* label) {
  const uint64_t word = CommitWord();
  const uint64_t area_bytes = Load<uint64_t>(ledger_page, kAreaBytesOffset);
  const uint8_t* area = ledger_page + Ledger::kHeaderBytes + (word >> 39 & 1) * area_bytes;
  const size_t type = Load<uint16_t>(area, (word & kTailMask) + kEntryTypeOffset);
  std::snprintf(label, 60, "commits %s to the ledger", EntryName(type, std::make_index_sequence<std::variant_size_v<LedgerEntry>>()));
}

void OnFault(int signal, siginfo_t* info, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  const auto* at = static_cast<const uint8_t*>(info->si_addr);
  if (ledger_page == nullptr || at < ledger_page || at >= ledger_page + Ledger::kHeaderBytes) {
    ::signal(signal, SIG_DFL);  // Somebody's bug: let it be seen.
    return;
  }
  char label[60] = "formats the ledger";
  if (at == ledger_page + kCommitOffset) DescribeCommit(label);
  stepping.emplace(label);
  mprotect(ledger_page, Ledger::kHeaderBytes, PROT_READ | PROT_WRITE);
  context->uc_mcontext.gregs[REG_EFL] |= kTrapFlag;
}

void OnStep(int, siginfo_t*, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  context->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
  mprotect(ledger_page, Ledger::kHeaderBytes, PROT_READ);
  stepping.reset();
}

void WatchLedger(void* at) {
  ledger_page = static_cast<uint8_t*>(at);
  struct sigaction action {};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = OnFault;
  sigaction(SIGSEGV, &action, nullptr);
  action.sa_sigaction = OnStep;
  sigaction(SIGTRAP, &action, nullptr);
  mprotect(ledger_page, Ledger::kHeaderBytes, PROT_READ);
}

// --- joining

bool Open(const char* path) {
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return false;
  REAL(mmap);
  void* at = real(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (at == MAP_FAILED) return false;
  control = static_cast<Control*>(at);
  return true;
}

// Daemons say in their environment where the control file is, and by their arguments who they are.
__attribute__((constructor)) void JoinAsDaemon() {
  const char* path = std::getenv("BOUNDARY_CONTROL");
  if (path == nullptr) return;
  char arguments[256] = {};
  const int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
  const ssize_t size = read(fd, arguments, sizeof arguments - 1);
  close(fd);
  const std::string_view first(arguments);
  if (size <= 0 || !first.ends_with("safepointd") || !Open(path)) return;
  const bool worker = std::string_view(arguments + first.size() + 1) == "worker";
  if (worker) {
    std::snprintf(process_name, sizeof process_name, "worker %u", control->workers.fetch_add(1) + 1);
    control->worker_pid.store(getpid());
  } else {
    std::snprintf(process_name, sizeof process_name, "keeper");
  }
  role = worker ? Role::kWorker : Role::kKeeper;
}

// The trainer's own two calls around an action that no call of the C library shows.
std::optional<Event> marked;

}  // namespace
}  // namespace sp

using namespace sp;

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

// For a trainer. 0: joined.
EXPORTED int boundary_join(const char* path, const char* process) {
  if (!Open(path)) return -1;
  std::snprintf(process_name, sizeof process_name, "%s", process);
  role = Role::kTrainer;
  return 0;
}
EXPORTED void boundary_begin(const char* label) { marked.emplace(label); }
EXPORTED void boundary_end() { marked.reset(); }

EXPORTED ssize_t sendmsg(int fd, const msghdr* message, int flags) {
  REAL(sendmsg);
  char label[60];
  const bool ours = role != Role::kNone && message->msg_iovlen == 1 &&
                    DescribeMessage(static_cast<const uint8_t*>(message->msg_iov[0].iov_base), message->msg_iov[0].iov_len, true, label);
  const Event event(ours ? label : nullptr);
  return real(fd, message, flags);
}

EXPORTED ssize_t recvmsg(int fd, msghdr* message, int flags) {
  REAL(recvmsg);
  if (role == Role::kNone) return real(fd, message, flags);
  // Only what is there already is an event; a look does not take it away, and takes no descriptor.
  uint8_t head[kKeeperFrameBytes + 1];
  iovec part{.iov_base = head, .iov_len = sizeof head};
  msghdr look{};
  look.msg_iov = &part;
  look.msg_iovlen = 1;
  const ssize_t seen = real(fd, &look, MSG_PEEK | MSG_DONTWAIT);
  char label[60];
  const Event event(seen > 0 && DescribeMessage(head, static_cast<size_t>(seen), false, label) ? label : nullptr);
  return real(fd, message, flags);
}

EXPORTED int connect(int fd, const sockaddr* address, socklen_t size) {
  REAL(connect);
  const Event event(role == Role::kTrainer && address->sa_family == AF_UNIX ? "connects" : nullptr);
  return real(fd, address, size);
}

EXPORTED int accept4(int fd, sockaddr* address, socklen_t* size, int flags) {
  REAL(accept4);
  pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
  const Event event(role == Role::kWorker && poll(&entry, 1, 0) > 0 ? "accepts a connection" : nullptr);
  return real(fd, address, size, flags);
}

EXPORTED void* mmap(void* at, size_t size, int protection, int flags, int fd, off_t offset) noexcept {
  REAL(mmap);
  if (fd < 0 || role == Role::kNone || role == Role::kKeeper) return real(at, size, protection, flags, fd, offset);
  const bool ledger = role == Role::kWorker && IsKind(fd, "safepoint-ledger");
  const bool extent = role == Role::kTrainer && IsKind(fd, "safepoint-extent");
  const Event event(ledger ? "maps the ledger" : extent ? "maps an extent" : nullptr);
  void* mapped = real(at, size, protection, flags, fd, offset);
  if (ledger && mapped != MAP_FAILED) WatchLedger(mapped);
  return mapped;
}
EXPORTED void* mmap64(void* at, size_t size, int protection, int flags, int fd, off_t offset) noexcept {
  return mmap(at, size, protection, flags, fd, offset);
}

EXPORTED int epoll_ctl(int epoll, int operation, int fd, epoll_event* event) noexcept {
  REAL(epoll_ctl);
  const char* label = nullptr;
  if (role == Role::kWorker && operation == EPOLL_CTL_ADD) {
    if (fd == kWorkerListenFd) label = "begins to serve";
    else if (fd == kWorkerControlFd) label = "watches the keeper";
    else if (IsKind(fd, "[pidfd]")) label = "watches a trainer's process";
  }
  const Event boundary(label);
  return real(epoll, operation, fd, event);
}

// Only the executor's threads do this, when a check or a file is done.
EXPORTED ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  const Event event(role == Role::kWorker && size == sizeof(uint64_t) && IsKind(fd, "[eventfd]") ? "ends a check" : nullptr);
  return real(fd, data, size);
}

EXPORTED pid_t fork() noexcept {
  REAL(fork);
  if (role != Role::kKeeper) return real();
  Event event("starts the worker");
  const pid_t pid = real();
  if (pid == 0) {  // Nobody yet; the program that it becomes joins by itself.
    role = Role::kNone;
    event.Forget();
  }
  if (pid > 0) control->worker_pid.store(pid);
  return pid;
}

// Files of the state directory.
EXPORTED int open(const char* path, int flags, ...) {
  REAL(open);
  mode_t mode = 0;
  if (flags & (O_CREAT | O_TMPFILE)) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  const bool ours = role == Role::kWorker && (flags & O_CREAT) && std::strstr(path, "/markers/") != nullptr;
  const Event event(ours ? "creates the marker's file" : nullptr);
  return real(path, flags, mode);
}
EXPORTED DIR* fdopendir(int fd) {
  REAL(fdopendir);
  const Event event(role == Role::kWorker && IsKind(fd, "/markers") ? "reads the markers" : nullptr);
  return real(fd);
}
EXPORTED int fsync(int fd) {
  REAL(fsync);
  struct stat info {};
  const bool directory = fstat(fd, &info) == 0 && S_ISDIR(info.st_mode);
  const Event event(role != Role::kWorker ? nullptr : directory ? "syncs the markers' directory" : "syncs the marker's file");
  return real(fd);
}

}  // extern "C"
