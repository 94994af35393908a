/* What is done in a VMM's process before its program begins: for the shim, which then executes it, and for the zygote (zygote.c), whose
 * processes are the program already. */
#ifndef VMM_START_H
#define VMM_START_H

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
enum { NR_OPEN_TREE = 428, NR_MOVE_MOUNT = 429, NR_FSOPEN = 430, NR_FSCONFIG = 431, NR_FSMOUNT = 432 }; /* everywhere the same */
enum { MAX_PASS = 64, MAX_GROUPS = 32, DEVICE_ROOM = 128 };

/* Who it is to be, and which descriptors are its own. */
struct start {
    long uid, gid; /* -1: as it is */
    int group_count, passed;
    gid_t groups[MAX_GROUPS];
    int pass_fds[MAX_PASS];
    char device[DEVICE_ROOM]; /* empty: none */
};

struct start_error {
    int error;
    char what[16];
};

static _Noreturn void child_fail(int pipe, const char *what)
{
    struct start_error e = {.error = errno};
    snprintf(e.what, sizeof e.what, "%s", what);
    if (write(pipe, &e, sizeof e) != (ssize_t)sizeof e)
        _exit(126);
    _exit(125);
}

/* Of the descriptors from 3 on. The list is sorted by this. */
static void close_all_but(int *keep, int n)
{
    for (int i = 1; i < n; i++) /* insertion sort: a handful */
        for (int j = i; j && keep[j] < keep[j - 1]; j--) {
            int t = keep[j];
            keep[j] = keep[j - 1];
            keep[j - 1] = t;
        }
    unsigned from = 3;
    for (int i = 0; i <= n; i++) {
        unsigned to = i < n ? (unsigned)keep[i] : UINT_MAX;
        if (i == n || to > from)
            if (syscall(SYS_close_range, from, i < n ? to - 1 : UINT_MAX, 0) < 0)
                for (unsigned fd = from; fd < (i < n ? to : 65536u); fd++) /* before Linux 5.9 */
                    close((int)fd);
        if (i < n)
            from = to + 1;
    }
}

/* A node of our own over the host's one, in a namespace of our own: nothing of it is seen outside, and it goes with the process. */
static void own_device(const struct start *s, int errors)
{
    struct stat host;
    if (stat(s->device, &host) < 0 || !S_ISCHR(host.st_mode))
        child_fail(errors, "device");
    if (unshare(CLONE_NEWNS) < 0)
        child_fail(errors, "mount namespace");
    /* In a chroot the root is not a mount point, but what the device lies on is: nothing else is mounted over here. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 && (errno != EINVAL || mount(NULL, "/dev", NULL, MS_REC | MS_SLAVE, NULL) < 0))
        child_fail(errors, "mount namespace");
    int fs = (int)syscall(NR_FSOPEN, "tmpfs", 1);
    if (fs < 0 || syscall(NR_FSCONFIG, fs, 6 /* create */, NULL, NULL, 0) < 0)
        child_fail(errors, "fsopen");
    int root = (int)syscall(NR_FSMOUNT, fs, 1, 0);
    if (root < 0 || mknodat(root, "node", S_IFCHR | 0600, host.st_rdev) < 0 || fchownat(root, "node", (uid_t)s->uid, (gid_t)s->gid, 0) < 0)
        child_fail(errors, "mknod");
    int tree = (int)syscall(NR_OPEN_TREE, root, "node", O_CLOEXEC | 1 /* clone */);
    if (tree < 0 || syscall(NR_MOVE_MOUNT, tree, "", AT_FDCWD, s->device, 4 /* empty source path */) < 0)
        child_fail(errors, "move_mount");
    close(tree);
    close(root);
    close(fs);
}

/* ``errors``: where what went wrong is told. It and ``cgroup`` (-1: none) are close-on-exec. */
static void become_vmm(const struct start *s, pid_t parent, int output, int errors, int cgroup)
{
    sigset_t none;
    sigemptyset(&none);
    for (int number = 1; number < 65; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    if (cgroup >= 0 && write(cgroup, "0", 1) != 1)
        child_fail(errors, "cgroup");
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core); /* a core would be the guest's memory */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0)
        child_fail(errors, "stdio");
    close(null);
    /* Everything is close-on-exec from the start; the named ones are let through here. */
    for (int i = 0; i < s->passed; i++)
        if (fcntl(s->pass_fds[i], F_SETFD, 0) < 0)
            child_fail(errors, "pass-fd");
    if (*s->device)
        own_device(s, errors);
    if (s->uid >= 0) {
        if (setgroups((size_t)s->group_count, s->groups) < 0)
            child_fail(errors, "setgroups");
        if (setresgid((gid_t)s->gid, (gid_t)s->gid, (gid_t)s->gid) < 0)
            child_fail(errors, "setresgid");
        if (setresuid((uid_t)s->uid, (uid_t)s->uid, (uid_t)s->uid) < 0)
            child_fail(errors, "setresuid");
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        child_fail(errors, "no_new_privs");
    /* After the change of user, which clears it; then look whether the parent died before it could take effect. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        child_fail(errors, "pdeathsig");
    if (getppid() != parent)
        _exit(125);
}

#endif
