/* Makes calls of the C library on files of a checkpoint hang or fail, while a test says so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITES = 1, SYNCS = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int hanging, failing;

/* Which calls hang, which fail with EIO: bits of the enumeration above. */
void storage_does(int hangs, int fails) {
  pthread_mutex_lock(&lock);
  hanging = hangs;
  failing = fails;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
}

static int of_a_checkpoint(int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strstr(path, ".orbax-checkpoint-tmp") && strstr(path, "/d/");
}

static int refused(int kind, int descriptor) {
  if (!of_a_checkpoint(descriptor)) return 0;
  pthread_mutex_lock(&lock);
  while (hanging & kind) pthread_cond_wait(&changed, &lock);
  int fails = failing & kind;
  pthread_mutex_unlock(&lock);
  if (fails) errno = EIO;
  return fails;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) {
  return refused(WRITES, fd) ? -1 : NEXT(write)(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
  return refused(WRITES, fd) ? -1 : NEXT(writev)(fd, parts, n);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
  return refused(WRITES, fd) ? -1 : NEXT(pwrite64)(fd, data, n, at);
}

int fsync(int fd) { return refused(SYNCS, fd) ? -1 : NEXT(fsync)(fd); }
