/* The guest agent: modes and the event loop. PID 1 in a machine, or an ordinary program with --socket or --stdio. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct agent agent;
static int epoll_fd = -1;
static uint64_t next_wake;
static bool children_ended;

uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t since_boot_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_BOOTTIME, &t);
	return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000;
}

bool watch_add(struct watch *w, uint32_t events)
{
	struct epoll_event e = {.events = events | EPOLLET, .data.ptr = w};
	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, w->fd, &e) == 0;
}

void watch_close(struct watch *w)
{
	if (w->fd >= 0) {
		/* The description may live on in a child that was forked, not executed (an applet): closing is not enough. */
		epoll_ctl(epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
		close(w->fd);
		w->fd = -1;
	}
}

void wake_at(uint64_t ns)
{
	if (!next_wake || ns < next_wake)
		next_wake = ns;
}

void logf_host(const char *level, const char *format, ...)
{
	char text[512];
	va_list args;
	va_start(args, format);
	text_formatv(text, sizeof text, format, args);
	va_end(args);
	if (agent.debug)
		text_complain("stoker-agent: %s: %s\n", level, text);
	uint8_t buffer[768];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 3);
	mpw_key_str(&w, "e", "log");
	mpw_key_str(&w, "level", level);
	mpw_str(&w, "text");
	mpw_clean(&w, text);
	if (!w.full && channel_synced())
		channel_send(FRAME_EVENT, 0, 0, buffer, w.length);
}

size_t read_small(const char *path, char *buffer, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	size_t have = 0;
	if (fd >= 0) {
		ssize_t n;
		while (have < size - 1 && (n = read(fd, buffer + have, size - 1 - have)) > 0)
			have += (size_t)n;
		close(fd);
	}
	buffer[have] = 0;
	return have;
}

static void on_signal(struct watch *w, uint32_t events)
{
	(void)events;
	struct signalfd_siginfo info[8];
	ssize_t n;
	while ((n = read(w->fd, info, sizeof info)) > 0)
		for (size_t i = 0; i < (size_t)n / sizeof *info; i++)
			switch (info[i].ssi_signo) {
			case SIGCHLD:
				children_ended = true;
				break;
			case SIGUSR1: /* what busybox halt, poweroff and reboot send to PID 1 */
			case SIGUSR2:
				power_request(false, 1000);
				break;
			default:
				power_request(true, 1000);
			}
}

void signals_watch(void)
{
	static struct watch w = {.ready = on_signal, .fd = -1};
	sigset_t all, some;
	/* Everything is blocked, and no handler is ever installed: a child that shares our memory cannot run one. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&some);
	sigaddset(&some, SIGCHLD);
	if (agent.mode == MODE_INIT && !agent.beside) {
		sigaddset(&some, SIGUSR1);
		sigaddset(&some, SIGUSR2);
		sigaddset(&some, SIGTERM);
		sigaddset(&some, SIGINT);
	} else if (agent.mode != MODE_INIT) {
		sigset_t deadly = some;
		sigemptyset(&deadly);
		sigaddset(&deadly, SIGINT);
		sigaddset(&deadly, SIGTERM);
		sigaddset(&deadly, SIGHUP);
		sigprocmask(SIG_UNBLOCK, &deadly, NULL);
	}
	if (agent.mode != MODE_INIT) {
		/* What whoever started us ignores must not be ignored by every command; past the library, which hides two of them. */
		const unsigned long standard[4] = {0};
		unsigned long old[4];
		for (int number = 1; number <= 64; number++)
			if (syscall(SYS_rt_sigaction, number, NULL, old, 8) == 0 && old[0] == (unsigned long)SIG_IGN)
				syscall(SYS_rt_sigaction, number, standard, NULL, 8);
	}
	signal(SIGPIPE, SIG_IGN);
	watch_close(&w);
	w.fd = signalfd(-1, &some, SFD_CLOEXEC | SFD_NONBLOCK);
	watch_add(&w, EPOLLIN);
}

static void loop(void)
{
	bool more = false;
	while (!agent.leaving) {
		struct epoll_event events[64];
		int timeout = -1;
		if (more) {
			timeout = 0;
		} else if (next_wake) {
			uint64_t now = now_ns();
			/* Rounded up: waking too early would spin. */
			timeout = next_wake <= now ? 0 : (int)((next_wake - now + 999999) / 1000000);
		}
		int n = epoll_wait(epoll_fd, events, 64, timeout);
		for (int i = 0; i < n; i++) {
			struct watch *w = events[i].data.ptr;
			if (w->fd >= 0)
				w->ready(w, events[i].events);
		}
		next_wake = 0;
		more = channel_work();
		if (children_ended) {
			children_ended = false;
			processes_reap();
		}
		more |= processes_work();
		more |= power_work();
		more |= copies_work();
		channel_flush();
		processes_swept();
	}
}

static struct rlimit inherited;

static void own_limits(void)
{
	/* Three descriptors for each of 4,096 processes. Children get their own limit in launch.c. */
	struct rlimit l = {524288, 524288};
	getrlimit(RLIMIT_NOFILE, &inherited);
	if (setrlimit(RLIMIT_NOFILE, &l)) {
		getrlimit(RLIMIT_NOFILE, &l);
		l.rlim_cur = l.rlim_max;
		setrlimit(RLIMIT_NOFILE, &l);
	}
}

void limits_restore(void)
{
	setrlimit(RLIMIT_NOFILE, &inherited);
}

static int listen_unix(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof a.sun_path)
		return -1;
	strcpy(a.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	unlink(path);
	if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 4))
		return -1;
	return fd;
}

static int usage(void)
{
	static const char text[] = "usage: stoker-agent --socket PATH | --stdio | --version\n"
				   "As PID 1 it takes no arguments. Protocol: docs/agent-protocol.md\n";
	return write(2, text, sizeof text - 1) < 0 ? 1 : 2;
}

int main(int argc, char **argv)
{
	agent.started_us = since_boot_us();
	agent.mode = MODE_INIT;
	agent.name = argv[0];
	const char *path = NULL;
	if (argc == 3 && !strcmp(argv[1], "--socket")) {
		agent.mode = MODE_SOCKET;
		path = argv[2];
	} else if (argc == 2 && !strcmp(argv[1], "--stdio")) {
		agent.mode = MODE_STDIO;
	} else if (argc == 2 && !strcmp(argv[1], "--version")) {
		static const char version[] = "stoker-agent " AGENT_VERSION "\n";
		return write(1, version, sizeof version - 1) < 0;
	} else if (getpid() != 1) {
		return usage();
	}
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (agent.mode == MODE_INIT) {
		boot();
	} else {
		/* Orphans come to us as they would to PID 1. */
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
		agent.debug = getenv("STOKER_DEBUG") != NULL;
	}
	agent.ready_us = since_boot_us();
	own_limits();
	signals_watch();
	if (agent.mode == MODE_SOCKET) {
		int fd = listen_unix(path);
		if (fd < 0) {
			text_complain("%s: %s\n", path, strerror(errno));
			return 1;
		}
		channel_listen(fd);
	} else if (agent.mode == MODE_STDIO) {
		int in = fcntl(0, F_DUPFD_CLOEXEC, 10), out = fcntl(1, F_DUPFD_CLOEXEC, 10), null = open("/dev/null", O_RDWR);
		/* Nobody else may write into the channel, not even a stray message of ours. */
		dup2(null, 0);
		dup2(2, 1);
		close(null);
		channel_open(in, out);
	}
	loop();
	return 0;
}
