/* The init of the VMM tests' guests: does what probe=... on the kernel's command line says, and tells of it on the console. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char line[4096];

static const char *word(const char *name)
{
    static char value[2048];
    size_t n = strlen(name);
    for (char *at = line; (at = strstr(at, name)); at += n)
        if (at == line || at[-1] == ' ') {
            snprintf(value, sizeof value, "%s", at + n);
            value[strcspn(value, " \n")] = 0;
            return value;
        }
    return "";
}

static void slurp(const char *path, char *into, size_t size)
{
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, into, size - 1);
    into[n < 0 ? 0 : n] = 0;
    if (fd >= 0)
        close(fd);
}

static void load_modules(void)
{
    char name[256], path[300];
    FILE *list = fopen("/modules/list", "r");
    while (list && fscanf(list, "%255s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
            printf("module %s: %s\n", name, strerror(errno));
        close(fd);
    }
}

static int port(void)
{
    char path[300];
    for (int i = 0; i < 500; i++, usleep(2000)) {
        DIR *d = opendir("/sys/class/virtio-ports");
        for (struct dirent *e; d && (e = readdir(d));)
            if (e->d_name[0] == 'v') {
                snprintf(path, sizeof path, "/dev/%s", e->d_name);
                int fd = open(path, O_RDWR);
                if (fd >= 0)
                    return fd;
            }
        if (d)
            closedir(d);
    }
    return -1;
}

static void echo(void)
{
    char buffer[4096];
    int fd = port();
    printf("echo %d\n", fd >= 0);
    for (;;) {
        ssize_t n = read(fd, buffer, sizeof buffer);
        if (n > 0 && write(fd, buffer, (size_t)n) != n)
            printf("short write\n");
        if (n <= 0)
            usleep(1000);
    }
}

static void disks(void)
{
    for (char letter = 'a'; letter <= 'z'; letter++) {
        char path[64], serial[64], size[64];
        snprintf(path, sizeof path, "/sys/block/vd%c/size", letter);
        if (access(path, R_OK))
            break;
        slurp(path, size, sizeof size);
        snprintf(path, sizeof path, "/sys/block/vd%c/serial", letter);
        slurp(path, serial, sizeof serial);
        snprintf(path, sizeof path, "/dev/vd%c", letter);
        char first[17] = {0};
        char read_only[80], value[8];
        snprintf(read_only, sizeof read_only, "/sys/block/vd%c/ro", letter);
        slurp(read_only, value, sizeof value);
        int writable = value[0] == '0', fd = open(path, writable ? O_RDWR : O_RDONLY);
        if (pread(fd, first, 16, 0) != 16)
            printf("unreadable\n");
        if (writable && (pwrite(fd, "written by guest", 16, 4096) != 16 || fsync(fd)))
            printf("unwritable\n");
        close(fd);
        printf("disk vd%c %s %ld %s %s\n", letter, serial, atol(size), writable ? "rw" : "ro", first);
    }
}

static void address(struct sockaddr *into, const char *text)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(text)};
    memcpy(into, &in, sizeof in);
}

static void network_up(void)
{
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    for (int i = 0; i < 500 && !if_nametoindex("eth0"); i++)
        usleep(2000);
    struct ifreq r = {.ifr_name = "eth0"};
    address(&r.ifr_addr, "10.0.2.15");
    if (ioctl(s, SIOCSIFADDR, &r))
        printf("no address: %s\n", strerror(errno));
    address(&r.ifr_netmask, "255.255.255.0");
    ioctl(s, SIOCSIFNETMASK, &r);
    ioctl(s, SIOCGIFFLAGS, &r);
    r.ifr_flags |= IFF_UP | IFF_RUNNING;
    ioctl(s, SIOCSIFFLAGS, &r);
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    address(&route.rt_dst, "0.0.0.0");
    address(&route.rt_genmask, "0.0.0.0");
    address(&route.rt_gateway, "10.0.2.2");
    if (ioctl(s, SIOCADDRT, &route))
        printf("no route: %s\n", strerror(errno));
    close(s);
}

/* targets=tcp:1.1.1.1:80,udp:...: all are tried at once, for as long as wait=MS; "reach TARGET yes FIRST-BYTES" or "no". */
static void reach(void)
{
    char list[2048], *rest = list;
    struct pollfd set[64];
    char *names[64];
    int state[64] = {0}, n = 0, tcp[64];
    snprintf(list, sizeof list, "%s", word("targets="));
    for (char *one; n < 64 && (one = strsep(&rest, ","));) {
        char host[32], kind[8];
        int to;
        names[n] = one;
        if (sscanf(one, "%7[a-z]:%31[0-9.]:%d", kind, host, &to) != 3)
            continue;
        tcp[n] = !strcmp(kind, "tcp");
        int fd = socket(AF_INET, (tcp[n] ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK, 0);
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(host), .sin_port = htons((unsigned short)to)};
        if (connect(fd, (struct sockaddr *)&in, sizeof in) && errno != EINPROGRESS)
            printf("connect %s: %s\n", one, strerror(errno));
        if (!tcp[n])
            send(fd, "question", 8, 0);
        set[n].fd = fd;
        set[n].events = tcp[n] ? POLLOUT : POLLIN;
        n++;
    }
    for (int waited = 0, most = atoi(word("wait=")); waited < most; waited += 50) {
        poll(set, (nfds_t)n, 50);
        for (int i = 0; i < n; i++) {
            if (!set[i].revents || state[i])
                continue;
            if (set[i].events == POLLOUT) {
                set[i].events = POLLIN;
                if (send(set[i].fd, "question", 8, MSG_NOSIGNAL) < 0)
                    set[i].fd = -1;
                continue;
            }
            char answer[64] = {0};
            ssize_t got = recv(set[i].fd, answer, sizeof answer - 1, 0);
            if (got > 0) {
                state[i] = 1;
                answer[strcspn(answer, "\n")] = 0;
                printf("reach %s yes %s\n", names[i], answer);
            }
            set[i].fd = -1;
        }
    }
    for (int i = 0; i < n; i++)
        if (!state[i])
            printf("reach %s no\n", names[i]);
}

int main(void)
{
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    setvbuf(stdout, NULL, _IOLBF, 0);
    slurp("/proc/cmdline", line, sizeof line);
    load_modules();
    const char *what = word("probe=");
    char verb[32];
    snprintf(verb, sizeof verb, "%s", what);
    printf("probe %s\n", verb);
    if (!strcmp(verb, "echo"))
        echo();
    if (!strcmp(verb, "die"))
        return 3;
    if (!strcmp(verb, "fatal"))
        printf("stoker-agent: fatal: no_channel: there is no port named stoker.agent\n");
    if (!strcmp(verb, "flood")) {
        static char text[65536];
        memset(text, 'x', sizeof text);
        for (size_t i = 99; i < sizeof text; i += 100)
            text[i] = '\n';
        for (;;)
            write(1, text, sizeof text);
    }
    if (!strcmp(verb, "disks"))
        disks();
    if (!strcmp(verb, "reach")) {
        network_up();
        reach();
    }
    printf("probe ends\n");
    reboot(strcmp(verb, "reboot") ? RB_POWER_OFF : RB_AUTOBOOT);
    return 0;
}
