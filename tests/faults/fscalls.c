/* Logs the calls that change a file system below a directory, and dies before one of them.

   Preloaded. Nothing is logged before arm(). Those calls are made one after the other: when one
   begins, those before it have returned and no other has begun. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHUTDOWN 0x8004587d /* The same for ext4 and xfs: the file system stops as in a power cut. */
#define NO_LOG_FLUSH 2
#define NOT_CUT "the power was not cut\n"

static pthread_mutex_t one_by_one = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static char due_call[PATH_MAX + 64];
static int due, met, log_to = -1, cut = -1, cut_late;

/* Logs calls below `directory` from now on. Before the `nth` of those that are logged as `call`,
   cuts the power of the file system that `cut_descriptor` is of, unless it is -1, and kills the
   process. */
void arm(const char *directory, const char *call, int nth, int log_descriptor, int cut_descriptor,
         int late) {
  strcpy(due_call, call);
  due = nth, met = 0, log_to = log_descriptor, cut = cut_descriptor, cut_late = late;
  root_length = strlen(strcpy(root, directory));
}

void disarm(void) { root_length = 0; }

/* Shuts down the file system of a directory; if `late`, after somebody else has synced a file of
   theirs, which commits the journal and what of ours is in it. Returns 0 if it could. */
int cut_power(int directory, int late) {
  if (late) {
    int other = syscall(SYS_openat, directory, "unrelated", O_CREAT | O_WRONLY, 0600);
    if (other < 0 || syscall(SYS_write, other, "x", 1) != 1 || syscall(SYS_fsync, other)) return -1;
    syscall(SYS_close, other);
  }
  unsigned flags = NO_LOG_FLUSH;
  return ioctl(directory, SHUTDOWN, &flags);
}

static int is_below(const char *path) {
  return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

#define HEXADECIMAL "0123456789abcdef"

/* Puts a star in the place of what is random behind a mark. */
static void make_plain_behind(char *path, const char *mark) {
  char *random = strstr(path, mark);
  if (!random) return;
  random += strlen(mark);
  size_t length = strspn(random, HEXADECIMAL);
  if (length) memmove(random + 1, random + length, strlen(random + length) + 1), *random = '*';
}

/* Removes what is random in a file's name, or says that it was replaced while it was open. */
static void make_plain(char *path) {
  char *name = strstr(path, "/d/");
  if (name && strspn(name + 3, HEXADECIMAL) == 32) strcpy(name + 3, "*");
  make_plain_behind(path, ".exporting-");
  make_plain_behind(path, ".orbax-checkpoint-tmp-");
  char *gone = strstr(path, " (deleted)");
  if (gone) *gone = 0;
}

static int enter(const char *call, const char *path) {
  if (!root_length || !is_below(path)) return 0;
  pthread_mutex_lock(&one_by_one);
  char line[PATH_MAX + 64];
  snprintf(line, sizeof line - 1, "%s %s", call, path + root_length);
  make_plain(line);
  int is_due = !strcmp(line, due_call) && ++met == due;
  syscall(SYS_write, log_to, line, strlen(strcat(line, "\n")));
  if (is_due) {
    if (cut >= 0 && cut_power(cut, cut_late)) syscall(SYS_write, log_to, NOT_CUT, sizeof NOT_CUT - 1);
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  return 1;
}

static void leave(int entered) {
  if (entered) pthread_mutex_unlock(&one_by_one);
}

/* The path of a descriptor, or of a name in the directory of one. */
static const char *path_at(int directory, const char *name, char *buffer) {
  if (!root_length) return "";
  if (name && name[0] == '/') return name;
  char link[64];
  if (directory == AT_FDCWD) strcpy(link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  if (length < 0) return "";
  buffer[length] = 0;
  if (name) snprintf(buffer + length, PATH_MAX - length, "/%s", name);
  return buffer;
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define COUNTED(call, path, type, expression) \
  int entered = enter(call, path); \
  type result = expression; \
  leave(entered); \
  return result

#define ON_DESCRIPTOR(type, name, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    char buffer[PATH_MAX]; \
    COUNTED(#name, path_at(fd, NULL, buffer), type, real arguments); \
  }

#define ON_PATH(type, name, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    char buffer[PATH_MAX]; \
    COUNTED(#name, path_at(AT_FDCWD, path, buffer), type, real arguments); \
  }

#define ON_PATH_AT(type, name, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    char buffer[PATH_MAX]; \
    COUNTED(#name, path_at(at, path, buffer), type, real arguments); \
  }

ON_DESCRIPTOR(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
ON_DESCRIPTOR(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
ON_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at),
              (fd, data, n, at))
ON_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec *data, int n), (fd, data, n))
ON_DESCRIPTOR(ssize_t, pwritev, (int fd, const struct iovec *data, int n, off_t at),
              (fd, data, n, at))
ON_DESCRIPTOR(ssize_t, pwritev64, (int fd, const struct iovec *data, int n, off64_t at),
              (fd, data, n, at))
ON_DESCRIPTOR(ssize_t, sendfile, (int fd, int from, off_t *at, size_t n), (fd, from, at, n))
ON_DESCRIPTOR(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t n), (fd, from, at, n))
ON_DESCRIPTOR(int, fsync, (int fd), (fd))
ON_DESCRIPTOR(int, fdatasync, (int fd), (fd))
ON_DESCRIPTOR(int, syncfs, (int fd), (fd))
ON_DESCRIPTOR(int, ftruncate, (int fd, off_t n), (fd, n))
ON_DESCRIPTOR(int, ftruncate64, (int fd, off64_t n), (fd, n))
ON_DESCRIPTOR(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n))
ON_DESCRIPTOR(int, posix_fallocate, (int fd, off_t at, off_t n), (fd, at, n))
ON_PATH(int, truncate, (const char *path, off_t n), (path, n))
ON_PATH(int, truncate64, (const char *path, off64_t n), (path, n))
ON_PATH(int, unlink, (const char *path), (path))
ON_PATH(int, remove, (const char *path), (path))
ON_PATH(int, rmdir, (const char *path), (path))
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, rename, (const char *from, const char *path), (from, path))
ON_PATH(int, link, (const char *from, const char *path), (from, path))
ON_PATH(int, symlink, (const char *to, const char *path), (to, path))
ON_PATH_AT(int, unlinkat, (int at, const char *path, int flags), (at, path, flags))
ON_PATH_AT(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode))
ON_PATH_AT(int, renameat, (int from_at, const char *from, int at, const char *path),
           (from_at, from, at, path))
ON_PATH_AT(int, renameat2,
           (int from_at, const char *from, int at, const char *path, unsigned flags),
           (from_at, from, at, path, flags))
ON_PATH_AT(int, linkat, (int from_at, const char *from, int at, const char *path, int flags),
           (from_at, from, at, path, flags))
ON_PATH_AT(int, symlinkat, (const char *to, int at, const char *path), (to, at, path))

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t n,
                        unsigned flags) {
  REAL(copy_file_range);
  char buffer[PATH_MAX];
  COUNTED("copy_file_range", path_at(fd, NULL, buffer), ssize_t,
          real(from, from_at, fd, at, n, flags));
}

/* Opening a file counts where it may create or empty one. */
#define MODE(last) \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list arguments; \
    va_start(arguments, last); \
    mode = va_arg(arguments, int); \
    va_end(arguments); \
  }

#define CHANGES(path) (flags & (O_CREAT | O_TRUNC) ? (path) : "")

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    MODE(flags) \
    char buffer[PATH_MAX]; \
    COUNTED(#name, CHANGES(path_at(AT_FDCWD, path, buffer)), int, real(path, flags, mode)); \
  }

#define OPEN_AT(name) \
  int name(int at, const char *path, int flags, ...) { \
    REAL(name); \
    MODE(flags) \
    char buffer[PATH_MAX]; \
    COUNTED(#name, CHANGES(path_at(at, path, buffer)), int, real(at, path, flags, mode)); \
  }

OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)
ON_PATH(int, creat, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, creat64, (const char *path, mode_t mode), (path, mode))

#define FOPEN(name) \
  FILE *name(const char *path, const char *how) { \
    REAL(name); \
    char buffer[PATH_MAX]; \
    COUNTED(#name, how[0] == 'r' ? "" : path_at(AT_FDCWD, path, buffer), FILE *, real(path, how)); \
  }

FOPEN(fopen)
FOPEN(fopen64)
