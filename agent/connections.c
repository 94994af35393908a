/* What other processes of a copied machine hold: connections that are somebody else's now, and an sshd that has to read new keys. */
#define _GNU_SOURCE
#include "agent.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SSHD_MAX = 64, PROCESSES_MAX = 32768, REPAIR_OFF_QUIETLY = -1 };

struct sshd {
	pid_t pid, parent;
};

/* The address as 16 bytes; false: not of the Internet. */
static bool address_of(const struct sockaddr_storage *s, uint8_t out[16])
{
	memset(out, 0, 16);
	if (s->ss_family == AF_INET) {
		out[10] = out[11] = 0xff;
		memcpy(out + 12, &((const struct sockaddr_in *)s)->sin_addr, 4);
	} else if (s->ss_family == AF_INET6) {
		memcpy(out, &((const struct sockaddr_in6 *)s)->sin6_addr, 16);
	}
	return s->ss_family == AF_INET || s->ss_family == AF_INET6;
}

static bool is_loopback(const uint8_t a[16])
{
	static const uint8_t six[16] = {[15] = 1}, four[12] = {[10] = 0xff, [11] = 0xff};
	return !memcmp(a, six, 16) || (!memcmp(a, four, 12) && a[12] == 127);
}

static bool leads_outside(int fd)
{
	struct sockaddr_storage own, peer;
	socklen_t a = sizeof own, b = sizeof peer, c = sizeof(int);
	uint8_t from[16], to[16];
	int type = 0, protocol = 0, listens = 0;
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &c) || type != SOCK_STREAM || getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &c) ||
	    protocol != IPPROTO_TCP || getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &c) || listens)
		return false;
	if (getsockname(fd, (struct sockaddr *)&own, &a) || !address_of(&own, from) || is_loopback(from))
		return false;
	if (getpeername(fd, (struct sockaddr *)&peer, &b) == 0)
		return address_of(&peer, to) && !is_loopback(to) && memcmp(from, to, 16);
	/* Not connected: never was, or is about to be. */
	struct tcp_info info = {0};
	c = sizeof info;
	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &c) == 0 && info.tcpi_state == TCP_SYN_SENT;
}

/* In repair mode a connection ends without a word to the peer, who is still connected with the original. Its owner reads an error. */
static bool drop(int fd)
{
	static const struct sockaddr nobody = {.sa_family = AF_UNSPEC};
	int on = 1, off = REPAIR_OFF_QUIETLY;
	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &on, sizeof on))
		return false;
	bool ok = connect(fd, &nobody, sizeof nobody) == 0;
	setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &off, sizeof off);
	return ok;
}

static void drop_of(pid_t pid, struct others *o)
{
	char path[64];
	int process = (int)syscall(SYS_pidfd_open, pid, 0);
	text_format(path, sizeof path, "/proc/%d/fd", (int)pid);
	DIR *d = process < 0 ? NULL : opendir(path);
	if (!d && errno == ENOSYS)
		o->error = ENOSYS;
	for (struct dirent *e; d && (e = readdir(d));) {
		char link[16];
		if (!isdigit((unsigned char)e->d_name[0]) || readlinkat(dirfd(d), e->d_name, link, sizeof link) < 8 || memcmp(link, "socket:[", 8))
			continue;
		int fd = (int)syscall(SYS_pidfd_getfd, process, (int)text_number(e->d_name, NULL), 0);
		if (fd < 0 && errno != EBADF && errno != ESRCH)
			o->error = errno;
		if (fd >= 0 && leads_outside(fd)) {
			if (drop(fd))
				o->dropped++;
			else
				o->error = errno;
		}
		if (fd >= 0)
			close(fd);
	}
	if (d)
		closedir(d);
	if (process >= 0)
		close(process);
}

static pid_t parent_of(pid_t pid)
{
	char path[64], text[512];
	text_format(path, sizeof path, "/proc/%d/stat", (int)pid);
	read_small(path, text, sizeof text);
	char *at = strrchr(text, ')');
	return at && strlen(at) > 4 ? (int)text_number(at + 4, NULL) : 0;
}

/* The one that listens; those it started for a connection have it for their parent, and would end it. */
static void reload(const struct sshd *all, unsigned n, struct others *o)
{
	for (unsigned i = 0; i < n; i++) {
		bool child = false;
		for (unsigned k = 0; k < n; k++)
			child |= all[i].parent == all[k].pid;
		if (!child && kill(all[i].pid, SIGHUP) == 0)
			o->reloaded++;
	}
}

/* Who is to be looked at. All but the kernel's own threads come from the first process. */
static struct {
	pid_t pids[PROCESSES_MAX];
	unsigned count;
	bool full;
} all;

static void look_at(const char *number)
{
	pid_t pid = (int)text_number(number, NULL);
	if (pid <= 0)
		return;
	all.full |= all.count == PROCESSES_MAX;
	if (!all.full)
		all.pids[all.count++] = pid;
}

static bool look_at_children(int fd)
{
	static char children[65536];
	const char *at = children;
	size_t have = 0;
	ssize_t n;
	while (have < sizeof children - 1 && (n = pread(fd, children + have, sizeof children - 1 - have, (off_t)have)) > 0)
		have += (size_t)n;
	all.full |= have == sizeof children - 1;
	for (children[have] = 0; *at; at += strcspn(at, " "), at += *at == ' ')
		look_at(at);
	return fd >= 0;
}

/* False: this kernel does not tell. */
static bool look_at_thread(pid_t pid, const char *thread)
{
	char path[64];
	text_format(path, sizeof path, "/proc/%d/task/%s/children", (int)pid, thread);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool told = look_at_children(fd);
	if (fd >= 0)
		close(fd);
	return told;
}

/* What is in a directory of numbers. */
static bool each(const char *path, bool (*visit)(pid_t, const char *), pid_t pid)
{
	bool any = false;
	DIR *d = opendir(path);
	for (struct dirent *e; d && (e = readdir(d));)
		if (isdigit((unsigned char)e->d_name[0]))
			any |= visit(pid, e->d_name);
	if (d)
		closedir(d);
	return any;
}

/* Reading all of /proc takes several times as long. */
static bool children_of(pid_t pid)
{
	char path[64], thread[16];
	struct stat st;
	text_format(thread, sizeof thread, "%d", (int)pid);
	text_format(path, sizeof path, "/proc/%s/task", thread);
	/* A link for each thread, but of the directory's own two. */
	if (stat(path, &st) == 0 && st.st_nlink == 3)
		return look_at_thread(pid, thread);
	return each(path, look_at_thread, pid);
}

static bool look_at_any(pid_t pid, const char *number)
{
	(void)pid;
	look_at(number);
	return true;
}

static int own_children = -1;

void others_prepare(void)
{
	own_children = open("/proc/1/task/1/children", O_RDONLY | O_CLOEXEC);
}

static void find_all(void)
{
	all.count = 0;
	all.full = false;
	look_at("1");
	/* Finding the file is most of the work in a machine that runs nothing. */
	if (getpid() == 1 && own_children >= 0 ? !look_at_children(own_children) : !children_of(1))
		each("/proc", look_at_any, 0);
	else
		for (unsigned i = 1; i < all.count; i++)
			children_of(all.pids[i]);
}

void others_visit(bool connections, bool sshd, struct others *o)
{
	static struct sshd found[SSHD_MAX];
	unsigned n = 0;
	*o = (struct others){0};
	find_all();
	for (unsigned i = 0; i < all.count; i++) {
		char path[64], name[32];
		pid_t pid = all.pids[i];
		text_format(path, sizeof path, "/proc/%d/exe", (int)pid);
		if (pid == getpid() || readlink(path, name, sizeof name) < 0)
			continue;
		text_format(path, sizeof path, "/proc/%d/comm", (int)pid);
		read_small(path, name, sizeof name);
		name[strcspn(name, "\n")] = 0;
		if (o->count++ < 8)
			text_format(o->names + strlen(o->names), sizeof o->names - strlen(o->names), "%s%.15s", *o->names ? ", " : "", name);
		if (connections)
			drop_of(pid, o);
		if (sshd && !strcmp(name, "sshd") && n < SSHD_MAX)
			found[n++] = (struct sshd){pid, parent_of(pid)};
	}
	if (all.full)
		o->error = E2BIG;
	reload(found, n, o);
}
