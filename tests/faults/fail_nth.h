/* What the preloaded library, the trainer of the campaign and the campaign share: one control block in a file that all of them map.
 * Plain C, because the library is (fail_nth.c says why). The campaign reads it by the offsets below. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define FAIL_NTH_MAGIC 0x6874466eu /* "nFth" */

/* The environment variable that names the file. Without it the library does nothing. */
#define FAIL_NTH_FILE "SP_FAIL_NTH"

/* Who a process is, by its command line: "safepointd worker", another safepointd, anybody else. */
enum { FAIL_NTH_TRAINER = 1, FAIL_NTH_WORKER = 2, FAIL_NTH_KEEPER = 3, FAIL_NTH_ROLES = 4 };

/* `alloc` stands for malloc, calloc, realloc, aligned_alloc, memalign and posix_memalign, and so for operator new. */
#define FAIL_NTH_FUNCTIONS(X)                                                                                                       \
  X(alloc) X(memfd_create) X(ftruncate) X(fallocate) X(mmap) X(munmap) X(madvise) X(mlock) X(fcntl) X(socket) X(socketpair)         \
  X(connect) X(bind) X(listen) X(accept4) X(accept) X(sendmsg) X(recvmsg) X(read) X(write) X(pread) X(pwrite) X(epoll_create1)      \
  X(epoll_ctl) X(epoll_wait) X(poll) X(ppoll) X(eventfd) X(signalfd) X(timerfd_create) X(timerfd_settime) X(syscall) X(open)        \
  X(close) X(fsync) X(fchmod) X(chmod) X(stat) X(fstat) X(lstat) X(rename) X(unlink) X(mkdir) X(flock) X(fork) X(execve) X(waitpid) \
  X(kill) X(dup2) X(pipe2) X(setsid) X(prctl) X(pthread_create) X(getrandom) X(getsockopt) X(setsockopt) X(getrlimit)               \
  X(setrlimit) X(ioctl) X(sched_getaffinity)

#define FAIL_NTH_ENUM(name) FAIL_NTH_##name,
enum { FAIL_NTH_FUNCTIONS(FAIL_NTH_ENUM) FAIL_NTH_COUNT };
#undef FAIL_NTH_ENUM

#define FAIL_NTH_SITE_DEPTH 24

/* An `error` that is no errno: read, write, pread and pwrite move half of the bytes. */
#define FAIL_NTH_SHORT (-1)

struct FailNth {
  uint32_t magic;
  uint32_t armed;          /* 1: calls of `role` to `function` count, and fail. Written by whoever controls the run. */
  uint32_t role;
  uint32_t function;
  int32_t error;
  uint32_t from_then_on;   /* 0: call number n fails. 1: so do all later ones. */
  uint64_t n;              /* From 1. */
  uint64_t calls;          /* Seen while armed. */
  uint64_t injected;       /* Of those, how many failed. */
  uint64_t profile[FAIL_NTH_ROLES][FAIL_NTH_COUNT]; /* Calls while armed, of everybody, whatever is chosen to fail. */
  uint64_t site_pid;       /* Where the first failure was: offsets in the program, 0 for other libraries. */
  uint64_t site[FAIL_NTH_SITE_DEPTH];
};
