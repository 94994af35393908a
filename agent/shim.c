/*
 * stoker-shim: one small supervisor per virtual machine monitor.
 *
 *   stoker-shim --dir DIR [--owner-fd N] [--status-fd N] [--console-fd N] [--console-bytes N]
 *               [--uid U --gid G [--groups G1,G2] [--device PATH]] [--cgroup FILE]
 *               [--net-out N --net-in N --net-deny FILE] [--go-fd N] [--journal SANDBOX] [--vmm-pid P --vmm-fd N]
 *               [--pass-fd N]... -- VMM ARGV...
 *
 * It exists so that a machine can outlive the process that started it, and cannot when it must not:
 *
 * - The VMM gets SIGKILL from the kernel when the shim dies, however it dies (PDEATHSIG, checked against the race with a
 *   parent that is gone already). The shim kills it when the owner's pipe (--owner-fd, a read end) is at its end, and on SIGTERM.
 * - Every descriptor that is not named on the command line is closed; the VMM gets 0, 1, 2 and the --pass-fd ones only.
 * - --console-fd is the read end of a pipe whose write end the VMM got (--pass-fd) as its serial console; standard output and
 *   error of the VMM are a pipe of ours. They end in DIR/console.log and DIR/vmm.log, each bounded: when a file holds half of
 *   its bound it is renamed to X.log.1 and a new one begun. A flood costs one read per 10 ms and file, and no memory.
 * - DIR/shim.json says who runs (written to --status-fd too, one line), DIR/exit.json how the VMM ended. Both appear whole
 *   (rename). A shim that was killed leaves no exit.json.
 *   shim.json: {"boot":"...","shim":{"pid":P,"start":T},"vmm":{"pid":P,"start":T}}        T: field 22 of /proc/PID/stat
 *   exit.json: {"code":N|null,"signal":N|null,"cause":"vmm"|"owner"|"term"|"exec","errno":N,"oom":true|false}
 *   When nothing could be started the status line is {"error":"what","errno":N}.
 * - With --go-fd (a read end) the VMM is not started before a byte comes; at the pipe's end instead nothing is. Meanwhile somebody puts
 *   us where everything that we start is to be (a unit of systemd's).
 * - With --journal both logs go to journald too, line by line, and so do the VMM's start and end. A flood costs the lines beyond
 *   LINES_PER_SECOND (their number is told), and journald that does not keep up costs its own.
 * - The network filter reads the frames the guest sends (QEMU's filter-redirector: 4 bytes length, big endian, then the frame)
 *   from --net-out and writes those that may pass to --net-in. Frames only come back through us, so without us none passes.
 *   --net-deny: lines "nameserver A.B.C.D" and "deny A.B.C.D/N".
 * - With --vmm-pid the VMM is a process already, our child, that waits at --vmm-fd to be told who it is (zygote.c).
 *
 *   stoker-shim --tsc-khz     prints the frequency of the host's time stamp counter
 *
 * With --device the VMM sees, in a mount namespace of its own, a node of that device that belongs to its user: for hosts where
 * /dev/kvm is for root alone.
 *
 * With --uid the VMM has no capability and no supplementary group but those named; the shim itself keeps CAP_KILL alone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "vmm_start.h"

#define CAP_KILL_BIT (1u << 5)

enum { MAX_DENY = 4096, PAUSE_MS = 10 };
enum { FRAME_MIN = 14, FRAME_MAX = 1514, LENGTH_MAX = 4096 + 65536 + 64, NET_IN = 1 << 17, NET_OUT = 1 << 18 };

enum { LINE_MAX_BYTES = 1024, LINES_PER_SECOND = 200 };
#define JOURNAL "/run/systemd/journal/socket"

static int dir_fd = -1, owner_fd = -1, status_fd = -1, console_fd = -1, cgroup_fd = -1, go_fd = -1, journal_fd = -1;
static const char *sandbox; /* what its lines in the journal are marked with */
static struct start start = {.uid = -1, .gid = -1};
static pid_t waiting_vmm; /* a process of the zygote's that is our child, and waits for its orders at waiting_fd */
static int waiting_fd = -1;

/* ------------------------------------------------------------------------------------------------- small helpers -- */

static void write_all(int fd, const char *text, size_t n)
{
    while (n) {
        ssize_t done = write(fd, text, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return;
        text += done;
        n -= (size_t)done;
    }
}

/* Says what could not be done, to the one who waits on the status pipe and to stderr, and ends. */
static _Noreturn void fail(const char *what, int error)
{
    char line[256];
    int n = snprintf(line, sizeof line, "{\"error\":\"%s\",\"errno\":%d}\n", what, error);
    if (n < 0 || n >= (int)sizeof line)
        n = 0;
    if (status_fd >= 0)
        write_all(status_fd, line, (size_t)n);
    dprintf(2, "stoker-shim: %s: %s\n", what, error ? strerror(error) : "bad argument");
    _exit(125);
}

static long number(const char *text, long low, long high, const char *what)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < low || value > high)
        fail(what, 0);
    return value;
}

static int descriptor(const char *text, const char *what)
{
    int fd = (int)number(text, 3, 1 << 20, what);
    if (fcntl(fd, F_GETFD) < 0)
        fail(what, errno);
    return fd;
}

static long long now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static size_t slurp(const char *path, char *into, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    size_t have = 0;
    ssize_t got;
    while (have < size - 1 && (got = read(fd, into + have, size - 1 - have)) > 0)
        have += (size_t)got;
    close(fd);
    into[have] = 0;
    return have;
}

/* Field 22 of /proc/PID/stat; the second field is in parentheses and may hold anything. */
static unsigned long long start_time(pid_t pid)
{
    char path[32], text[2048];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    slurp(path, text, sizeof text);
    char *at = strrchr(text, ')');
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at + 1, NULL, 10) : 0;
}

/* How often the kernel has killed for lack of memory; tells an OOM kill from any other SIGKILL. */
static unsigned long long oom_kills(void)
{
    static char text[16384];
    slurp("/proc/vmstat", text, sizeof text);
    char *at = strstr(text, "\noom_kill ");
    return at ? strtoull(at + 10, NULL, 10) : 0;
}

static void publish(const char *name, const char *text, size_t n)
{
    char beside[64];
    snprintf(beside, sizeof beside, "%s.tmp", name);
    int fd = openat(dir_fd, beside, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return;
    write_all(fd, text, n);
    close(fd);
    renameat(dir_fd, beside, dir_fd, name);
}

/* --------------------------------------------------------------------------------------------------------- journal -- */

/* A host without journald is no error: the files are there in any case. */
static void journal_open(void)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX, .sun_path = JOURNAL};
    journal_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (journal_fd >= 0 && connect(journal_fd, (struct sockaddr *)&to, sizeof to) < 0) {
        close(journal_fd);
        journal_fd = -1;
    }
}

/* One message; the text has no line breaks. What journald has no room for is lost: nobody waits for it. The unit (unit_name() in
 * engine/units.py) is said outright: journald looks up a sender's when it comes to the message, and by then we may have ended. */
static void journal(int priority, const char *stream, const char *text, size_t n)
{
    char message[LINE_MAX_BYTES + 256];
    if (journal_fd < 0)
        return;
    int size = snprintf(message, sizeof message, "PRIORITY=%d\nSYSLOG_IDENTIFIER=stoker\nSTOKER_SANDBOX=%s\nOBJECT_SYSTEMD_UNIT=stoker-%s.scope\n"
                        "STOKER_STREAM=%s\nMESSAGE=%.*s\n",
                        priority, sandbox, sandbox, stream, (int)n, text);
    if (size > 0 && size < (int)sizeof message)
        send(journal_fd, message, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void journal_event(int priority, const char *format, ...)
{
    char text[256];
    va_list words;
    va_start(words, format);
    int n = vsnprintf(text, sizeof text, format, words);
    va_end(words);
    if (n > 0)
        journal(priority, "machine", text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}

/* ---------------------------------------------------------------------------------------------------- bounded logs -- */

struct log {
    const char *name, *stream;
    int pipe, file;
    size_t size, half;
    long long not_before; /* floods are read at intervals, so that a byte at a time does not cost a wake-up at a time */
    char line[LINE_MAX_BYTES]; /* the beginning of a line that has not ended, for the journal */
    size_t begun;
    long long second; /* of the lines below */
    unsigned lines, left_out;
};

/* A new second has begun: what of the last one was left out is told. */
static void log_second(struct log *log)
{
    long long second = now_ms() / 1000;
    if (second == log->second)
        return;
    if (log->left_out)
        journal_event(5, "%u lines of the %s were left out", log->left_out, log->stream);
    log->second = second;
    log->lines = log->left_out = 0;
}

static void log_line(struct log *log)
{
    log_second(log);
    if (log->begun && log->lines++ < LINES_PER_SECOND)
        journal(6, log->stream, log->line, log->begun);
    else if (log->begun)
        log->left_out++;
    log->begun = 0;
}

/* Cuts what came into lines. Control characters go: this ends in somebody's terminal. */
static void log_journal(struct log *log, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c == '\n' || log->begun == sizeof log->line)
            log_line(log);
        if ((c >= ' ' && c != 127) || c == '\t')
            log->line[log->begun++] = (char)c;
    }
}

static void log_open(struct log *log)
{
    log->file = openat(dir_fd, log->name, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    log->size = 0;
}

static void log_write(struct log *log, const char *bytes, size_t n)
{
    while (n) {
        if (log->size >= log->half) {
            char older[64];
            snprintf(older, sizeof older, "%s.1", log->name);
            close(log->file);
            renameat(dir_fd, log->name, dir_fd, older);
            log_open(log);
        }
        size_t some = n < log->half - log->size ? n : log->half - log->size;
        ssize_t done = write(log->file, bytes, some);
        if (done <= 0) {
            if (done < 0 && errno == EINTR)
                continue;
            return; /* no space: what does not fit is lost, the machine goes on */
        }
        log->size += (size_t)done;
        bytes += done;
        n -= (size_t)done;
    }
}

/* Reads what is there, at most one buffer; false at the end. */
static int log_read(struct log *log, long long now)
{
    static char buffer[65536];
    ssize_t got = read(log->pipe, buffer, sizeof buffer);
    if (got > 0) {
        log_write(log, buffer, (size_t)got);
        if (journal_fd >= 0)
            log_journal(log, buffer, (size_t)got);
        log->not_before = got == (ssize_t)sizeof buffer ? 0 : now + PAUSE_MS;
        return 1;
    }
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 1;
    close(log->pipe);
    log->pipe = -1;
    return 0;
}

/* ------------------------------------------------------------------------------------------------- network filter -- */

static struct {
    int from, to;
    uint32_t nameserver;
    struct {
        uint32_t network, mask;
    } deny[MAX_DENY];
    int denied;
    unsigned char in[NET_IN], out[NET_OUT];
    size_t have, queued, skip; /* skip: bytes of an oversized frame still to be dropped */
} net; /* from and to are set first thing in main: an initialiser would put the buffers into the file */

static uint32_t be32(const unsigned char *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static unsigned be16(const unsigned char *p)
{
    return (unsigned)p[0] << 8 | p[1];
}

/* What may leave the guest: ARP, and whole, plain IPv4 packets of the three protocols the user network speaks, to addresses
 * that are not denied. The nameserver answers on port 53 only: on every other port its address is the host's own. */
static int frame_allowed(const unsigned char *f, size_t n)
{
    if (n < FRAME_MIN || n > FRAME_MAX)
        return 0;
    unsigned type = be16(f + 12);
    if (type == 0x0806)
        return n >= 42 && be16(f + 14) == 1 && be16(f + 16) == 0x0800 && f[18] == 6 && f[19] == 4;
    if (type != 0x0800 || n < 34)
        return 0;
    const unsigned char *ip = f + 14;
    unsigned total = be16(ip + 2), protocol = ip[9];
    /* 0x45: version 4 and no options, so the ports below are where we look. Fragments (all but DF must be clear) have none. */
    if (ip[0] != 0x45 || total < 20 || total > n - 14 || (be16(ip + 6) & 0xbfff) != 0)
        return 0;
    if (protocol != 1 && protocol != 6 && protocol != 17)
        return 0;
    uint32_t to = be32(ip + 16);
    if (to == net.nameserver)
        return ((protocol == 17 && total >= 28) || (protocol == 6 && total >= 40)) && be16(ip + 22) == 53;
    for (int i = 0; i < net.denied; i++)
        if ((to & net.deny[i].mask) == net.deny[i].network)
            return 0;
    return 1;
}

static void net_close(void)
{
    close(net.from);
    close(net.to);
    net.from = net.to = -1;
}

static void net_flush(void)
{
    while (net.queued) {
        ssize_t done = send(net.to, net.out, net.queued, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && errno == EAGAIN)
            return;
        if (done <= 0) {
            net_close();
            return;
        }
        net.queued -= (size_t)done;
        memmove(net.out, net.out + done, net.queued);
    }
}

/* The VMM waits in its main loop while we do not read, and we write to the same loop: so reading never stops, and what does not
 * fit into the queue is dropped, as on any wire. */
static void net_read(void)
{
    ssize_t got = recv(net.from, net.in + net.have, sizeof net.in - net.have, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        net_close();
        return;
    }
    net.have += (size_t)got;
    size_t at = 0;
    while (at < net.have) {
        if (net.skip) {
            size_t some = net.have - at < net.skip ? net.have - at : net.skip;
            net.skip -= some;
            at += some;
            continue;
        }
        if (net.have - at < 4)
            break;
        size_t n = be32(net.in + at);
        if (n > LENGTH_MAX) {
            net_close(); /* not QEMU's framing any more: nothing passes from here on */
            return;
        }
        if (n > FRAME_MAX) {
            net.skip = n;
            at += 4;
            continue;
        }
        if (net.have - at < 4 + n)
            break;
        if (frame_allowed(net.in + at + 4, n) && net.queued + 4 + n <= sizeof net.out) {
            memcpy(net.out + net.queued, net.in + at, 4 + n);
            net.queued += 4 + n;
        }
        at += 4 + n;
    }
    net.have -= at;
    memmove(net.in, net.in + at, net.have);
    net_flush();
}

static void net_rules(const char *path)
{
    static char text[1 << 17];
    size_t n = slurp(path, text, sizeof text);
    if (!n || n == sizeof text - 1)
        fail("net-deny", errno);
    for (char *rest = text, *line; (line = strsep(&rest, "\n"));) {
        struct in_addr address;
        if (!*line)
            continue;
        if (!strncmp(line, "nameserver ", 11) && inet_pton(AF_INET, line + 11, &address) == 1) {
            net.nameserver = ntohl(address.s_addr);
            continue;
        }
        char *slash = strncmp(line, "deny ", 5) ? NULL : strchr(line, '/');
        if (!slash || net.denied == MAX_DENY)
            fail("net-deny", 0);
        *slash = 0;
        long bits = number(slash + 1, 0, 32, "net-deny");
        if (inet_pton(AF_INET, line + 5, &address) != 1)
            fail("net-deny", 0);
        uint32_t mask = bits ? 0xffffffffu << (32 - bits) : 0;
        net.deny[net.denied].mask = mask;
        net.deny[net.denied++].network = ntohl(address.s_addr) & mask;
    }
    if (!net.denied)
        fail("net-deny", 0); /* an empty list is a mistake, not a wish */
}

/* --------------------------------------------------------------------------------------------------------- the VMM -- */

static _Noreturn void run_vmm(char **argv, pid_t parent, int output, int errors)
{
    become_vmm(&start, parent, output, errors, cgroup_fd);
    execv(argv[0], argv);
    child_fail(errors, "exec");
}

/* A root shim has no business but to signal a process of another user and to write to its own directory. */
static void drop_capabilities(void)
{
    struct {
        uint32_t version;
        int pid;
    } header = {0x20080522, 0};
    struct {
        uint32_t effective, permitted, inheritable;
    } data[2] = {{CAP_KILL_BIT, CAP_KILL_BIT, 0}, {0, 0, 0}};
    if (geteuid() == 0 && syscall(SYS_capset, &header, data) < 0 && errno != EPERM)
        fail("capset", errno);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

static void write_exit(int status, const char *cause, int error, int oom)
{
    char text[160], code[16] = "null", sig[16] = "null";
    if (error == 0 && WIFEXITED(status))
        snprintf(code, sizeof code, "%d", WEXITSTATUS(status));
    if (error == 0 && WIFSIGNALED(status))
        snprintf(sig, sizeof sig, "%d", WTERMSIG(status));
    int n = snprintf(text, sizeof text, "{\"code\":%s,\"signal\":%s,\"cause\":\"%s\",\"errno\":%d,\"oom\":%s}\n", code, sig, cause, error,
                     oom ? "true" : "false");
    publish("exit.json", text, (size_t)n);
}

static int told_to_go(void)
{
    char byte;
    ssize_t got;
    while ((got = read(go_fd, &byte, 1)) < 0 && errno == EINTR)
        ;
    close(go_fd);
    go_fd = -1;
    return got == 1;
}

/* See zygote.c. Should it be gone, nobody has the errors' other end, and the VMM is found to have ended. */
static void give_orders(int output, int errors)
{
    int fds[3] = {output, errors, cgroup_fd}, count = cgroup_fd >= 0 ? 3 : 2;
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof fds)];
    } control = {0};
    struct iovec orders = {&start, sizeof start};
    struct msghdr message = {.msg_iov = &orders, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = (socklen_t)CMSG_SPACE(sizeof(int) * (size_t)count)};
    control.head.cmsg_level = SOL_SOCKET;
    control.head.cmsg_type = SCM_RIGHTS;
    control.head.cmsg_len = (socklen_t)CMSG_LEN(sizeof(int) * (size_t)count);
    memcpy(CMSG_DATA(&control.head), fds, sizeof(int) * (size_t)count);
    if (sendmsg(waiting_fd, &message, MSG_NOSIGNAL) < 0)
        fail("zygote", errno);
    close(waiting_fd);
    waiting_fd = -1;
}

static pid_t start_vmm(char **argv, struct log *vmm)
{
    int output[2], errors[2];
    if (pipe2(output, O_CLOEXEC) < 0 || pipe2(errors, O_CLOEXEC) < 0)
        fail("pipe", errno);
    pid_t self = getpid(), pid = waiting_vmm ? waiting_vmm : fork();
    if (pid < 0)
        fail("fork", errno);
    if (pid == 0)
        run_vmm(argv, self, output[1], errors[1]);
    if (waiting_vmm)
        give_orders(output[1], errors[1]);
    close(output[1]);
    close(errors[1]);
    for (int i = 0; i < start.passed; i++)
        close(start.pass_fds[i]);
    struct start_error e;
    ssize_t got;
    while ((got = read(errors[0], &e, sizeof e)) < 0 && errno == EINTR)
        ;
    close(errors[0]);
    if (got == (ssize_t)sizeof e) {
        waitpid(pid, NULL, 0);
        write_exit(0, "exec", e.error ? e.error : EINVAL, 0);
        fail(e.what, e.error);
    }
    vmm->pipe = output[0];
    fcntl(vmm->pipe, F_SETFL, O_NONBLOCK);
    return pid;
}

static void announce(pid_t vmm)
{
    char boot[64] = "", text[256];
    slurp("/proc/sys/kernel/random/boot_id", boot, sizeof boot);
    boot[strcspn(boot, "\n")] = 0;
    int n = snprintf(text, sizeof text, "{\"boot\":\"%s\",\"shim\":{\"pid\":%d,\"start\":%llu},\"vmm\":{\"pid\":%d,\"start\":%llu}}\n", boot,
                     (int)getpid(), start_time(getpid()), (int)vmm, start_time(vmm));
    publish("shim.json", text, (size_t)n);
    if (status_fd >= 0) {
        write_all(status_fd, text, (size_t)n);
        close(status_fd);
        status_fd = -1;
    }
}

/* ----------------------------------------------------------------------------------------------------- supervision -- */

/* True when the VMM has to go because of a signal to us; SIGCHLD only wakes us up. */
static int signalled(int fd)
{
    struct signalfd_siginfo info;
    int asked = 0;
    while (read(fd, &info, sizeof info) == (ssize_t)sizeof info)
        asked |= info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT;
    return asked;
}

/* Data on the owner's pipe means nothing, its end does. */
static int owner_gone(void)
{
    char buffer[64];
    ssize_t got = read(owner_fd, buffer, sizeof buffer);
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

static void supervise(pid_t vmm, int signals, struct log *logs, unsigned long long ooms)
{
    const char *cause = "vmm";
    int status = 0;
    for (;;) {
        struct pollfd set[6] = {
            {signals, POLLIN, 0},      {owner_fd, POLLIN, 0}, {logs[0].pipe, POLLIN, 0}, {logs[1].pipe, POLLIN, 0},
            {net.from, POLLIN, 0},     {net.queued ? net.to : -1, POLLOUT, 0},
        };
        long long now = now_ms();
        int timeout = -1;
        for (int i = 0; i < 2; i++)
            if (logs[i].pipe >= 0 && logs[i].not_before > now) {
                int wait = (int)(logs[i].not_before - now);
                set[2 + i].fd = -1;
                timeout = timeout < 0 || wait < timeout ? wait : timeout;
            }
        for (int i = 0; i < 2; i++)
            if (logs[i].left_out && (timeout < 0 || timeout > 1000))
                timeout = 1000; /* a flood that is over is told of too */
        if (poll(set, 6, timeout) < 0 && errno != EINTR)
            break;
        int kill_it = set[0].revents && signalled(signals);
        if (kill_it)
            cause = "term";
        if (set[1].revents && owner_gone()) {
            close(owner_fd);
            owner_fd = -1;
            cause = "owner";
            kill_it = 1;
        }
        if (kill_it)
            kill(vmm, SIGKILL); /* ours and not reaped yet, so the number is still its own */
        now = now_ms();
        for (int i = 0; i < 2; i++)
            if (set[2 + i].revents)
                log_read(&logs[i], now);
        if (set[4].revents)
            net_read();
        if (set[5].revents && net.to >= 0)
            net_flush();
        for (int i = 0; i < 2; i++)
            log_second(&logs[i]);
        if (waitpid(vmm, &status, WNOHANG) == vmm)
            break;
    }
    for (int i = 0; i < 2; i++)
        for (int rounds = 0; logs[i].pipe >= 0 && rounds < 32; rounds++) {
            struct pollfd rest = {logs[i].pipe, POLLIN, 0};
            if (poll(&rest, 1, 0) <= 0 || !log_read(&logs[i], 0))
                break;
        }
    /* Whoever ends a whole unit signals the VMM and us: then it may be gone before we were at our own signal. */
    if (signalled(signals))
        cause = "term";
    int killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && !strcmp(cause, "vmm");
    int oom = killed && oom_kills() > ooms;
    write_exit(status, cause, 0, oom);
    for (int i = 0; i < 2; i++) {
        log_line(&logs[i]);
        if (logs[i].left_out)
            journal_event(5, "%u lines of the %s were left out", logs[i].left_out, logs[i].stream);
    }
    if (WIFSIGNALED(status))
        journal_event(strcmp(cause, "vmm") ? 6 : 3, "the machine was ended by signal %d%s%s", WTERMSIG(status),
                      strcmp(cause, "vmm") ? ", as it was asked to" : "", oom ? ", for lack of memory" : "");
    else
        journal_event(WEXITSTATUS(status) ? 3 : 6, "the machine ended with %d", WEXITSTATUS(status));
}

/* Closes what was not named, so that nothing of the starter's (sockets, databases, other machines' pipes) lives on in us. */
static void close_others(void)
{
    int keep[MAX_PASS + 10], n = 0;
    int named[] = {dir_fd, owner_fd, status_fd, console_fd, cgroup_fd, go_fd, waiting_fd, net.from, net.to};
    for (size_t i = 0; i < sizeof named / sizeof *named; i++)
        if (named[i] >= 0)
            keep[n++] = named[i];
    for (int i = 0; i < start.passed; i++)
        keep[n++] = start.pass_fds[i];
    close_all_but(keep, n);
    for (int i = 0; i < n; i++)
        fcntl(keep[i], F_SETFD, FD_CLOEXEC);
}

static char **options(int argc, char **argv, struct log *logs)
{
    const char *deny = NULL;
    int i = 1;
    for (; i + 1 < argc && strcmp(argv[i], "--"); i += 2) {
        const char *name = argv[i];
        char *value = argv[i + 1];
        if (!strcmp(name, "--dir"))
            dir_fd = open(value, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        else if (!strcmp(name, "--owner-fd"))
            owner_fd = descriptor(value, "owner-fd");
        else if (!strcmp(name, "--status-fd"))
            status_fd = descriptor(value, "status-fd");
        else if (!strcmp(name, "--console-fd"))
            console_fd = descriptor(value, "console-fd");
        else if (!strcmp(name, "--console-bytes"))
            logs[0].half = (size_t)number(value, 2, INT_MAX, "console-bytes") / 2;
        else if (!strcmp(name, "--uid"))
            start.uid = number(value, 1, INT_MAX, "uid");
        else if (!strcmp(name, "--gid"))
            start.gid = number(value, 1, INT_MAX, "gid");
        else if (!strcmp(name, "--cgroup"))
            cgroup_fd = open(value, O_WRONLY | O_CLOEXEC);
        else if (!strcmp(name, "--go-fd"))
            go_fd = descriptor(value, "go-fd");
        else if (!strcmp(name, "--journal"))
            sandbox = value;
        else if (!strcmp(name, "--device")) {
            if (snprintf(start.device, sizeof start.device, "%s", value) >= (int)sizeof start.device)
                fail("device", ENAMETOOLONG);
        } else if (!strcmp(name, "--net-out"))
            net.from = descriptor(value, "net-out");
        else if (!strcmp(name, "--net-in"))
            net.to = descriptor(value, "net-in");
        else if (!strcmp(name, "--net-deny"))
            deny = value;
        else if (!strcmp(name, "--vmm-pid"))
            waiting_vmm = (pid_t)number(value, 1, INT_MAX, "vmm-pid");
        else if (!strcmp(name, "--vmm-fd"))
            waiting_fd = descriptor(value, "vmm-fd");
        else if (!strcmp(name, "--pass-fd") && start.passed < MAX_PASS)
            start.pass_fds[start.passed++] = descriptor(value, "pass-fd");
        else if (!strcmp(name, "--groups"))
            for (char *group; (group = strsep(&value, ","));) {
                if (start.group_count == MAX_GROUPS)
                    fail("groups", 0);
                start.groups[start.group_count++] = (gid_t)number(group, 0, INT_MAX, "groups");
            }
        else
            fail("option", 0);
        if (!strcmp(name, "--cgroup") && cgroup_fd < 0)
            fail("cgroup", errno);
    }
    if (i + 1 >= argc || strcmp(argv[i], "--"))
        fail("usage", 0);
    if (dir_fd < 0)
        fail("dir", errno);
    if ((start.uid < 0) != (start.gid < 0) || !waiting_vmm != (waiting_fd < 0) || (net.from < 0) != (net.to < 0) || (net.from < 0) != !deny || (*start.device && start.uid < 0))
        fail("options", 0);
    if (deny)
        net_rules(deny);
    return argv + i + 1;
}

/* The frequency of this host's time stamp counter in kHz, measured against the clock; what a guest under TCG reads is this
 * counter, and on a busy host it cannot find the frequency out by itself. Each end takes the tightest of some pairs. */
static uint64_t counter_at(uint64_t *ns)
{
    uint64_t best = UINT64_MAX, counter = 0;
    for (int i = 0; i < 50; i++) {
        struct timespec t;
        uint64_t before = __builtin_ia32_rdtsc();
        clock_gettime(CLOCK_MONOTONIC, &t);
        uint64_t after = __builtin_ia32_rdtsc();
        if (after - before < best) {
            best = after - before;
            counter = before + best / 2;
            *ns = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
        }
    }
    return counter;
}

static int measure_counter(void)
{
    uint64_t from, to, first = counter_at(&from);
    struct timespec wait = {0, 40 * 1000 * 1000};
    nanosleep(&wait, NULL);
    uint64_t last = counter_at(&to);
    printf("%llu\n", (unsigned long long)((last - first) * 1000000 / (to - from)));
    return fflush(stdout) != 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "--tsc-khz"))
        return measure_counter();
    net.from = net.to = -1;
    struct log logs[2] = {{.name = "console.log", .stream = "console", .pipe = -1, .half = 2 << 20},
                          {.name = "vmm.log", .stream = "vmm", .pipe = -1, .half = 128 << 10}};
    char **command = options(argc, argv, logs);
    close_others();
    umask(077);
    setsid();
    if (chdir("/") < 0)
        fail("chdir", errno);
    signal(SIGPIPE, SIG_IGN);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP); /* taken, and without effect */
    sigaddset(&set, SIGCHLD);
    signal(SIGCHLD, SIG_DFL); /* an ignored SIGCHLD is inherited, and would reap the VMM behind our back */
    sigprocmask(SIG_SETMASK, &set, NULL);
    int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0)
        fail("signalfd", errno);
    if (owner_fd >= 0) {
        fcntl(owner_fd, F_SETFL, O_NONBLOCK);
        if (owner_gone())
            return 0;
    }
    for (int i = 0; i < 2; i++)
        log_open(&logs[i]);
    if (logs[0].file < 0 || logs[1].file < 0)
        fail("log", errno);
    logs[0].pipe = console_fd;
    if (console_fd >= 0)
        fcntl(console_fd, F_SETFL, O_NONBLOCK);
    if (go_fd >= 0 && !told_to_go())
        return 0;
    if (sandbox)
        journal_open();
    unsigned long long ooms = oom_kills();
    pid_t vmm = start_vmm(command, &logs[1]);
    journal_event(6, "the machine began as process %d", (int)vmm);
    if (cgroup_fd >= 0)
        close(cgroup_fd);
    drop_capabilities();
    announce(vmm);
    supervise(vmm, signals, logs, ooms);
    return 0;
}
