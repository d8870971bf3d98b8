/* Makes calls of the C library on files of a checkpoint hang or fail, while a test says so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* On the data of a process, and on what Orbax merges of it. */
enum { WRITES = 1, SYNCS = 2, CREATES = 4, MERGES = 8, MERGE_SYNCS = 16 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int hanging, failing, with_error;

/* Which calls hang, which fail with `error`: bits of the enumeration above. */
void storage_does(int hangs, int fails, int error) {
  pthread_mutex_lock(&lock);
  hanging = hangs;
  failing = fails;
  with_error = error;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
}

static int refused(int of_process, int of_merge, const char *path) {
  int kind = 0;
  if (!strstr(path, ".orbax-checkpoint-tmp")) return 0;
  if (strstr(path, "/ocdbt.process_")) kind = strstr(path, "/d/") ? of_process : 0;
  else if (strstr(path, "/d/") || strstr(path, "/manifest.ocdbt")) kind = of_merge;
  pthread_mutex_lock(&lock);
  while (hanging & kind) pthread_cond_wait(&changed, &lock);
  int fails = failing & kind;
  if (fails) errno = with_error;
  pthread_mutex_unlock(&lock);
  return fails;
}

static int refused_at(int of_process, int of_merge, int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return refused(of_process, of_merge, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) {
  return refused_at(WRITES, MERGES, fd) ? -1 : NEXT(write)(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
  return refused_at(WRITES, MERGES, fd) ? -1 : NEXT(writev)(fd, parts, n);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
  return refused_at(WRITES, MERGES, fd) ? -1 : NEXT(pwrite64)(fd, data, n, at);
}

int fsync(int fd) { return refused_at(SYNCS, MERGE_SYNCS, fd) ? -1 : NEXT(fsync)(fd); }

int open(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  return flags & O_CREAT && refused(CREATES, 0, path) ? -1 : NEXT(open)(path, flags, mode);
}
