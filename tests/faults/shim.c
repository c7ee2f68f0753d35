/* Kills the process inside the n-th write, fsync or rename below a folder, or lists these calls.
 *
 * Loaded before all other libraries (LD_PRELOAD). It does nothing but under these variables of the environment:
 *   FAULTS_BELOW   the folder, without a slash at its end; what lies in its tensorboard/ does not count
 *   FAULTS_LIST    a file that gets a line for each call: the thread ("main", or "other"), the call, the path
 *   FAULTS_THREAD  the thread in which the process is killed
 *   FAULTS_AT      the number of that thread's call, from 1, inside which it is killed: half of what a write was to
 *                  write is written, an fsync or a rename is not done
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_long calls;

/* Notes a call on a path; whether the process is to be killed in it. */
static int counts(const char *call, const char *path) {
    const char *below = getenv("FAULTS_BELOW"), *list = getenv("FAULTS_LIST"), *killed = getenv("FAULTS_THREAD");
    if (!below || strncmp(path, below, strlen(below)) != 0) return 0;
    const char *rest = path + strlen(below);
    if ((*rest && *rest != '/') || strncmp(rest, "/tensorboard/", 13) == 0) return 0;
    const char *thread = getpid() == (pid_t)syscall(SYS_gettid) ? "main" : "other";
    if (list) {
        char line[PATH_MAX + 32];
        int length = snprintf(line, sizeof line, "%s %s %s\n", thread, call, path);
        int file = open(list, O_CREAT | O_WRONLY | O_APPEND, 0600);
        syscall(SYS_write, file, line, (size_t)length);
        close(file);
    }
    return killed && strcmp(thread, killed) == 0 && atomic_fetch_add(&calls, 1) + 1 == atol(getenv("FAULTS_AT"));
}

static int counts_file(const char *call, int file) {
    char name[64], path[PATH_MAX];
    if (!getenv("FAULTS_BELOW")) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return counts(call, path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

ssize_t write(int file, const void *bytes, size_t size) {
    if (counts_file("write", file)) {
        REAL(write)(file, bytes, size / 2);
        die();
    }
    return REAL(write)(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (counts_file("write", file)) {
        REAL(write)(file, parts[0].iov_base, parts[0].iov_len / 2);
        die();
    }
    return REAL(writev)(file, parts, count);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t place) {
    if (counts_file("write", file)) {
        REAL(pwrite64)(file, bytes, size / 2, place);
        die();
    }
    return REAL(pwrite64)(file, bytes, size, place);
}

int fsync(int file) {
    if (counts_file("fsync", file)) die();
    return REAL(fsync)(file);
}

int rename(const char *from, const char *to) {
    if (counts("rename", to)) die();
    return REAL(rename)(from, to);
}
