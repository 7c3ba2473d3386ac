// A disk that fails: preloaded (LD_PRELOAD), it counts the calls that change files below a folder, and lets one of
// them, or all from one on, end with an error, or all take their time.
//
//   cc -shared -fPIC -O1 -o disk.so disk.c -ldl

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[4096];
static char names[1 << 20]; // of the files that were changed, one a line, the call before each
static long seen, first, last, delay_us;
static int error_number;

// Count calls below `path`; those from `from` to `to` (counted from 1) end with `error`.
void disk_arm(const char *path, long from, long to, int error, long microseconds) {
  snprintf(folder, sizeof folder, "%s", path);
  seen = 0, first = from, last = to, error_number = error, delay_us = microseconds;
  names[0] = 0;
}

long disk_calls(void) { return seen; }
const char *disk_names(void) { return names; }

static int below(const char *path) {
  return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int below_fd(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, 4095);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}

// Whether this call is to fail.
static int fails(const char *call, const char *path) {
  seen++;
  size_t used = strlen(names);
  snprintf(names + used, sizeof names - used, "%s %s\n", call, path);
  if (delay_us) {
    struct timespec t = {delay_us / 1000000, delay_us % 1000000 * 1000};
    nanosleep(&t, NULL);
  }
  if (error_number && seen >= first && seen <= last) {
    errno = error_number;
    return 1;
  }
  return 0;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
#define BY_FD(type, name, call, params, args, ...)                                                                    \
  type name params {                                                                                                  \
    char path[4096];                                                                                                  \
    if (folder[0] && below_fd(fd, path) && fails(#name, path)) return -1;                                             \
    return REAL(type, #name, __VA_ARGS__) args;                                                                       \
  }

BY_FD(ssize_t, write, w, (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
BY_FD(ssize_t, writev, w, (int fd, const struct iovec *v, int n), (fd, v, n), int, const struct iovec *, int)
BY_FD(ssize_t, pwrite, w, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
BY_FD(ssize_t, pwrite64, w, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), int, const void *, size_t,
      off64_t)
BY_FD(int, fsync, s, (int fd), (fd), int)
BY_FD(int, fdatasync, s, (int fd), (fd), int)
BY_FD(int, ftruncate, t, (int fd, off_t n), (fd, n), int, off_t)
BY_FD(int, ftruncate64, t, (int fd, off64_t n), (fd, n), int, off64_t)

#define MODE(flags)                                                                                                   \
  mode_t mode = 0;                                                                                                    \
  if ((flags) & (O_CREAT | O_TMPFILE)) {                                                                              \
    va_list rest;                                                                                                     \
    va_start(rest, flags);                                                                                            \
    mode = va_arg(rest, mode_t);                                                                                      \
    va_end(rest);                                                                                                     \
  }
#define OPEN(name)                                                                                                    \
  int name(const char *path, int flags, ...) {                                                                        \
    MODE(flags)                                                                                                       \
    if ((flags & (O_CREAT | O_TRUNC)) && below(path) && fails(#name, path)) return -1;                                \
    return REAL(int, #name, const char *, int, mode_t)(path, flags, mode);                                            \
  }
OPEN(open)
OPEN(open64)

int rename(const char *from, const char *to) {
  if (below(to) && fails("rename", to)) return -1;
  return REAL(int, "rename", const char *, const char *)(from, to);
}

int mkdir(const char *path, mode_t mode) {
  if (below(path) && fails("mkdir", path)) return -1;
  return REAL(int, "mkdir", const char *, mode_t)(path, mode);
}
