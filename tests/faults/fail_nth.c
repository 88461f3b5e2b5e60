/* Preloaded into trainer, keeper and worker: makes the N-th call of one function fail, or the N-th and all later ones.
 *
 * The control block (fail_nth.h) is shared by all processes of a run, so counting goes on over restarts of a process, and whoever
 * maps the file arms and disarms at any point of the run. A process whose role was not chosen only counts for the profile.
 *
 * C and not C++: definitions must agree with the C library's declarations, exception specifications included, and those differ from
 * one C library to the next. Nothing in here may allocate. */
#define _GNU_SOURCE
#include "fail_nth.h"

#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <sys/auxv.h>
#include <unistd.h>

static struct FailNth* control;
static uint32_t role;
static void* reals[FAIL_NTH_COUNT];
static const char* const names[] = {
#define NAME(name) #name,
    FAIL_NTH_FUNCTIONS(NAME)
#undef NAME
};

static void* Real(unsigned function) {
  if (reals[function] == NULL) reals[function] = dlsym(RTLD_NEXT, names[function]);
  return reals[function];
}
#define REAL(name) ((__typeof__(name)*)Real(FAIL_NTH_##name))

static uint32_t RoleOf(const char* command_line, ssize_t size) {
  const char* const end = command_line + size;
  const char* const second = command_line + strlen(command_line) + 1;
  const char* const slash = strrchr(command_line, '/');
  if (strcmp(slash != NULL ? slash + 1 : command_line, "safepointd") != 0) return FAIL_NTH_TRAINER;
  return second < end && strcmp(second, "worker") == 0 ? FAIL_NTH_WORKER : FAIL_NTH_KEEPER;
}

__attribute__((constructor)) static void Begin(void) {
  const char* const path = getenv(FAIL_NTH_FILE);
  if (path == NULL) return;
  for (unsigned function = 1; function < FAIL_NTH_COUNT; ++function) Real(function);
  void* warm[1];
  backtrace(warm, 1); /* Loads its library now, so that it needs none later. */
  char command_line[4096] = {0};
  const int self = REAL(open)("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
  const ssize_t size = REAL(read)(self, command_line, sizeof command_line - 1);
  REAL(close)(self);
  const int fd = REAL(open)(path, O_RDWR | O_CLOEXEC);
  if (fd < 0 || size <= 0) abort();
  struct FailNth* const mapped = REAL(mmap)(NULL, sizeof *mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  REAL(close)(fd);
  if (mapped == MAP_FAILED || mapped->magic != FAIL_NTH_MAGIC) abort();
  role = RoleOf(command_line, size);
  control = mapped;
}

static void RecordSite(void) {
  void* frames[FAIL_NTH_SITE_DEPTH + 3];
  const int depth = backtrace(frames, FAIL_NTH_SITE_DEPTH + 3);
  const char* const program = (const char*)getauxval(3 /* AT_PHDR */);
  control->site_pid = (uint64_t)getpid();
  for (int i = 3; i < depth; ++i) {
    Dl_info info;
    const int known = dladdr(frames[i], &info);
    /* The program's headers lie on its first page. */
    const int own = known != 0 && program - (const char*)info.dli_fbase >= 0 && program - (const char*)info.dli_fbase < 4096;
    control->site[i - 3] = own ? (uint64_t)((const char*)frames[i] - (const char*)info.dli_fbase) : 0;
  }
}

/* 0: the call is to be made as usual. Else the error. */
static int Fails(unsigned function) {
  struct FailNth* const c = control;
  if (c == NULL || __atomic_load_n(&c->armed, __ATOMIC_ACQUIRE) == 0) return 0;
  __atomic_fetch_add(&c->profile[role][function], 1, __ATOMIC_RELAXED);
  if (c->role != role || c->function != function) return 0;
  const uint64_t call = __atomic_add_fetch(&c->calls, 1, __ATOMIC_RELAXED);
  if (c->from_then_on ? call < c->n : call != c->n) return 0;
  if (__atomic_fetch_add(&c->injected, 1, __ATOMIC_RELAXED) == 0) RecordSite();
  return c->error;
}

/* A function that returns -1 and sets errno. */
#define PLAIN(type, name, parameters, ...)                \
  type name parameters {                                  \
    const int error = Fails(FAIL_NTH_##name);             \
    if (error == 0) return REAL(name)(__VA_ARGS__);       \
    errno = error;                                        \
    return -1;                                            \
  }

/* The same, for those that may also move a part of the bytes. Small ones are of pipes and event descriptors, which move all or nothing. */
enum { SMALL = 128 };
#define SHORTENED(name, parameters, size, ...)            \
  ssize_t name parameters {                               \
    const int error = Fails(FAIL_NTH_##name);             \
    if (error == FAIL_NTH_SHORT && size > SMALL) size /= 2; \
    if (error <= 0) return REAL(name)(__VA_ARGS__);       \
    errno = error;                                        \
    return -1;                                            \
  }

/* The C library exports these for programs that wrap its allocator. */
extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* old, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

static int AllocFails(void) {
  const int error = Fails(FAIL_NTH_alloc);
  if (error != 0) errno = error;
  return error;
}
void* malloc(size_t size) { return AllocFails() ? NULL : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return AllocFails() ? NULL : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return AllocFails() ? NULL : __libc_realloc(old, size); }
void* memalign(size_t alignment, size_t size) { return AllocFails() ? NULL : __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return AllocFails() ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** out, size_t alignment, size_t size) {
  if (AllocFails()) return ENOMEM;
  *out = __libc_memalign(alignment, size);
  return *out == NULL ? ENOMEM : 0;
}

PLAIN(int, memfd_create, (const char* name, unsigned flags), name, flags)
PLAIN(int, ftruncate, (int fd, off_t size), fd, size)
PLAIN(int, fallocate, (int fd, int mode, off_t offset, off_t size), fd, mode, offset, size)
PLAIN(int, munmap, (void* at, size_t size), at, size)
PLAIN(int, madvise, (void* at, size_t size, int advice), at, size, advice)
PLAIN(int, mlock, (const void* at, size_t size), at, size)
PLAIN(int, socket, (int domain, int type, int protocol), domain, type, protocol)
PLAIN(int, socketpair, (int domain, int type, int protocol, int ends[2]), domain, type, protocol, ends)
PLAIN(int, connect, (int fd, const struct sockaddr* address, socklen_t size), fd, address, size)
PLAIN(int, bind, (int fd, const struct sockaddr* address, socklen_t size), fd, address, size)
PLAIN(int, listen, (int fd, int backlog), fd, backlog)
PLAIN(int, accept4, (int fd, struct sockaddr* address, socklen_t* size, int flags), fd, address, size, flags)
PLAIN(int, accept, (int fd, struct sockaddr* address, socklen_t* size), fd, address, size)
PLAIN(ssize_t, sendmsg, (int fd, const struct msghdr* message, int flags), fd, message, flags)
PLAIN(ssize_t, recvmsg, (int fd, struct msghdr* message, int flags), fd, message, flags)
SHORTENED(read, (int fd, void* to, size_t size), size, fd, to, size)
SHORTENED(write, (int fd, const void* from, size_t size), size, fd, from, size)
SHORTENED(pread, (int fd, void* to, size_t size, off_t at), size, fd, to, size, at)
SHORTENED(pwrite, (int fd, const void* from, size_t size, off_t at), size, fd, from, size, at)
PLAIN(int, epoll_create1, (int flags), flags)
PLAIN(int, epoll_ctl, (int epoll, int operation, int fd, struct epoll_event* event), epoll, operation, fd, event)
PLAIN(int, epoll_wait, (int epoll, struct epoll_event* events, int most, int timeout), epoll, events, most, timeout)
PLAIN(int, poll, (struct pollfd* fds, nfds_t count, int timeout), fds, count, timeout)
PLAIN(int, ppoll, (struct pollfd* fds, nfds_t count, const struct timespec* timeout, const sigset_t* mask), fds, count, timeout, mask)
PLAIN(int, eventfd, (unsigned start, int flags), start, flags)
PLAIN(int, signalfd, (int fd, const sigset_t* mask, int flags), fd, mask, flags)
PLAIN(int, timerfd_create, (clockid_t clock, int flags), clock, flags)
PLAIN(int, timerfd_settime, (int fd, int flags, const struct itimerspec* time, struct itimerspec* old), fd, flags, time, old)
PLAIN(int, fsync, (int fd), fd)
PLAIN(int, fchmod, (int fd, mode_t mode), fd, mode)
PLAIN(int, chmod, (const char* path, mode_t mode), path, mode)
PLAIN(int, stat, (const char* path, struct stat* info), path, info)
PLAIN(int, fstat, (int fd, struct stat* info), fd, info)
PLAIN(int, lstat, (const char* path, struct stat* info), path, info)
PLAIN(int, rename, (const char* from, const char* to), from, to)
PLAIN(int, unlink, (const char* path), path)
PLAIN(int, mkdir, (const char* path, mode_t mode), path, mode)
PLAIN(int, flock, (int fd, int operation), fd, operation)
PLAIN(pid_t, fork, (void), )
PLAIN(int, execve, (const char* path, char* const* argv, char* const* env), path, argv, env)
PLAIN(pid_t, waitpid, (pid_t pid, int* status, int options), pid, status, options)
PLAIN(int, kill, (pid_t pid, int signal), pid, signal)
PLAIN(int, dup2, (int from, int to), from, to)
PLAIN(int, pipe2, (int ends[2], int flags), ends, flags)
PLAIN(pid_t, setsid, (void), )
PLAIN(ssize_t, getrandom, (void* to, size_t size, unsigned flags), to, size, flags)
PLAIN(int, getsockopt, (int fd, int level, int name, void* to, socklen_t* size), fd, level, name, to, size)
PLAIN(int, setsockopt, (int fd, int level, int name, const void* from, socklen_t size), fd, level, name, from, size)
PLAIN(int, getrlimit, (__rlimit_resource_t what, struct rlimit* limit), what, limit)
PLAIN(int, setrlimit, (__rlimit_resource_t what, const struct rlimit* limit), what, limit)
PLAIN(int, sched_getaffinity, (pid_t pid, size_t size, cpu_set_t* set), pid, size, set)

void* mmap(void* at, size_t size, int protection, int flags, int fd, off_t offset) {
  const int error = Fails(FAIL_NTH_mmap);
  if (error == 0) return REAL(mmap)(at, size, protection, flags, fd, offset);
  errno = error;
  return MAP_FAILED;
}

/* A close that fails has closed all the same, as on Linux. */
int close(int fd) {
  const int error = Fails(FAIL_NTH_close);
  const int closed = REAL(close)(fd);
  if (error == 0 || closed != 0) return closed;
  errno = error;
  return -1;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  const int error = Fails(FAIL_NTH_pthread_create);
  return error != 0 ? error : REAL(pthread_create)(thread, attributes, start, argument);
}

/* The optional arguments of all calls in use are words, and passing too many is harmless. */
#define OPTIONAL(last, count)                                               \
  long more[count];                                                         \
  {                                                                         \
    va_list list;                                                           \
    va_start(list, last);                                                   \
    for (int i = 0; i < count; ++i) more[i] = va_arg(list, long);           \
    va_end(list);                                                           \
  }

int open(const char* path, int flags, ...) {
  OPTIONAL(flags, 1)
  const int error = Fails(FAIL_NTH_open);
  if (error == 0) return REAL(open)(path, flags, (mode_t)more[0]);
  errno = error;
  return -1;
}

int fcntl(int fd, int command, ...) {
  OPTIONAL(command, 1)
  const int error = Fails(FAIL_NTH_fcntl);
  if (error == 0) return REAL(fcntl)(fd, command, more[0]);
  errno = error;
  return -1;
}

int ioctl(int fd, unsigned long request, ...) {
  OPTIONAL(request, 1)
  const int error = Fails(FAIL_NTH_ioctl);
  if (error == 0) return REAL(ioctl)(fd, request, more[0]);
  errno = error;
  return -1;
}

int prctl(int option, ...) {
  OPTIONAL(option, 4)
  const int error = Fails(FAIL_NTH_prctl);
  if (error == 0) return REAL(prctl)(option, more[0], more[1], more[2], more[3]);
  errno = error;
  return -1;
}

long syscall(long number, ...) {
  OPTIONAL(number, 6)
  const int error = Fails(FAIL_NTH_syscall);
  if (error == 0) return REAL(syscall)(number, more[0], more[1], more[2], more[3], more[4], more[5]);
  errno = error;
  return -1;
}
