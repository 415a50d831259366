/* Preloaded before libc: writes down each call on a file below one folder, and fails the n-th.
 *
 * Libraries write from C++ (torch), Rust (safetensors, tokenizers) and C (numpy) as well as from
 * Python; all of them come through here. Nothing happens until `disk_arm` is called, so that one
 * process can be warmed up and forked for every n.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CHANGES = 1, READS = 2 };          /* what is counted */
enum { ONCE, FROM_THEN_ON, SHORT };       /* what happens at the n-th, see disk.py */

static char folder[PATH_MAX];
static int counted, fail_with, mode, trace = -1;
static long fail_at, calls;

void disk_arm(const char *below, int kinds, long n, int error, int how, const char *trace_path)
{
    strncpy(folder, below, sizeof folder - 1);
    counted = kinds, fail_at = n, fail_with = error, mode = how, calls = 0;
    trace = syscall(SYS_openat, AT_FDCWD, trace_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

/* The absolute path of `path` as a call with the folder `fd` means it; of `fd` itself for NULL. */
static const char *absolute(char *out, int fd, const char *path)
{
    char link[64], base[PATH_MAX] = "";
    if (path && path[0] == '/')
        return path;
    if (fd == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return "";
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    snprintf(out, PATH_MAX, path ? "%.2000s/%.2000s" : "%.4000s", base, path);
    return out;
}

/* Whether this call is to fail, with errno set; -1 where it is to be cut short instead. */
static int fails(int kind, const char *call, int fd, const char *path, int to_fd, const char *to)
{
    char one[PATH_MAX], other[PATH_MAX], line[2 * PATH_MAX + 64];
    if (!(counted & kind))
        return 0;
    int saved = errno;
    const char *from = absolute(one, fd, path);
    size_t length = strlen(folder);
    if (strncmp(from, folder, length) || (from[length] != '/' && from[length])) {
        errno = saved;
        return 0;
    }
    long n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    int size = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", n, call, from,
                        to ? absolute(other, to_fd, to) : "");
    if (trace >= 0)
        syscall(SYS_write, trace, line, size);
    errno = saved;
    if (!fail_at || n < fail_at || (n > fail_at && mode != FROM_THEN_ON))
        return 0;
    /* a full disk still lets go of files */
    if (fail_with != EROFS && fail_with != EIO && (!strncmp(call, "unlink", 6) || !strcmp(call, "rmdir")))
        return 0;
    if (mode == SHORT)
        return strncmp(call, "write", 5) && strncmp(call, "pwrite", 6) ? 0 : -1;
    errno = fail_with;
    return 1;
}

static size_t half(size_t count) { return count > 1 ? count / 2 : count; }

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); \
        if (fails(writes ? CHANGES : READS, "open", AT_FDCWD, path, 0, 0)) return -1; \
        return real(path, flags, bits); }
OPEN(open) OPEN(open64)

#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); \
        if (fails(writes ? CHANGES : READS, "open", fd, path, 0, 0)) return -1; \
        return real(fd, path, flags, bits); }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(FILE *, name, const char *, const char *); \
        if (fails(strpbrk(how, "wa+") ? CHANGES : READS, "open", AT_FDCWD, path, 0, 0)) return NULL; \
        return real(path, how); }
FOPEN(fopen) FOPEN(fopen64)

#define WRITE(name, offset_type) \
    ssize_t name(int fd, const void *bytes, size_t count, offset_type offset) { \
        REAL(ssize_t, name, int, const void *, size_t, offset_type); \
        int failed = fails(CHANGES, #name, fd, NULL, 0, 0); \
        return failed > 0 ? -1 : real(fd, bytes, failed ? half(count) : count, offset); }
WRITE(pwrite, off_t) WRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *bytes, size_t count)
{
    REAL(ssize_t, write, int, const void *, size_t);
    int failed = fails(CHANGES, "write", fd, NULL, 0, 0);
    return failed > 0 ? -1 : real(fd, bytes, failed ? half(count) : count);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    REAL(ssize_t, writev, int, const struct iovec *, int);
    int failed = fails(CHANGES, "writev", fd, NULL, 0, 0);
    return failed > 0 ? -1 : real(fd, parts, failed && count > 1 ? count / 2 : count);
}

size_t fwrite(const void *bytes, size_t size, size_t count, FILE *file)
{
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    int failed = file == stdout || file == stderr ? 0 : fails(CHANGES, "fwrite", fileno(file), NULL, 0, 0);
    return failed > 0 ? 0 : real(bytes, size, count, file);
}

#define READ(name, ...) \
    ssize_t name(int fd, void *bytes, size_t count)  { \
        REAL(ssize_t, name, int, void *, size_t); \
        return fails(READS, #name, fd, NULL, 0, 0) ? -1 : real(fd, bytes, count); }
READ(read)

#define PREAD(name, offset_type) \
    ssize_t name(int fd, void *bytes, size_t count, offset_type offset) { \
        REAL(ssize_t, name, int, void *, size_t, offset_type); \
        return fails(READS, #name, fd, NULL, 0, 0) ? -1 : real(fd, bytes, count, offset); }
PREAD(pread, off_t) PREAD(pread64, off64_t)

size_t fread(void *bytes, size_t size, size_t count, FILE *file)
{
    REAL(size_t, fread, void *, size_t, size_t, FILE *);
    return fails(READS, "fread", fileno(file), NULL, 0, 0) ? 0 : real(bytes, size, count, file);
}

#define MMAP(name, offset_type) \
    void *name(void *at, size_t size, int protection, int flags, int fd, offset_type offset) { \
        REAL(void *, name, void *, size_t, int, int, int, offset_type); \
        int kind = (protection & PROT_WRITE) && (flags & MAP_SHARED) ? CHANGES : READS; \
        if (fd >= 0 && fails(kind, "mmap", fd, NULL, 0, 0)) return MAP_FAILED; \
        return real(at, size, protection, flags, fd, offset); }
MMAP(mmap, off_t) MMAP(mmap64, off64_t)

#define ON_FD(name) \
    int name(int fd) { \
        REAL(int, name, int); \
        return fails(CHANGES, #name, fd, NULL, 0, 0) > 0 ? -1 : real(fd); }
ON_FD(fsync) ON_FD(fdatasync)

#define TRUNCATE(name, type, offset_type, fd, path) \
    int name(type what, offset_type size) { \
        REAL(int, name, type, offset_type); \
        return fails(CHANGES, #name, fd, path, 0, 0) > 0 ? -1 : real(what, size); }
TRUNCATE(ftruncate, int, off_t, what, NULL) TRUNCATE(ftruncate64, int, off64_t, what, NULL)
TRUNCATE(truncate, const char *, off_t, AT_FDCWD, what)
TRUNCATE(truncate64, const char *, off64_t, AT_FDCWD, what)

#define FALLOCATE(name, offset_type) \
    int name(int fd, int how, offset_type offset, offset_type size) { \
        REAL(int, name, int, int, offset_type, offset_type); \
        return fails(CHANGES, #name, fd, NULL, 0, 0) > 0 ? -1 : real(fd, how, offset, size); }
FALLOCATE(fallocate, off_t) FALLOCATE(fallocate64, off64_t)

int rename(const char *from, const char *to)
{
    REAL(int, rename, const char *, const char *);
    return fails(CHANGES, "rename", AT_FDCWD, from, AT_FDCWD, to) > 0 ? -1 : real(from, to);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    REAL(int, renameat, int, const char *, int, const char *);
    return fails(CHANGES, "rename", from_fd, from, to_fd, to) > 0 ? -1 : real(from_fd, from, to_fd, to);
}

int mkdir(const char *path, mode_t bits)
{
    REAL(int, mkdir, const char *, mode_t);
    return fails(CHANGES, "mkdir", AT_FDCWD, path, 0, 0) > 0 ? -1 : real(path, bits);
}

#define REMOVE(name) \
    int name(const char *path) { \
        REAL(int, name, const char *); \
        return fails(CHANGES, #name, AT_FDCWD, path, 0, 0) > 0 ? -1 : real(path); }
REMOVE(unlink) REMOVE(rmdir)

int unlinkat(int fd, const char *path, int flags)
{
    REAL(int, unlinkat, int, const char *, int);
    return fails(CHANGES, "unlinkat", fd, path, 0, 0) > 0 ? -1 : real(fd, path, flags);
}
