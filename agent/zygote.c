/*
 * stoker-zygote.so: a VMM's program that was loaded once, for many machines.
 *
 * Preloaded into QEMU it takes the place of the C library's first function: everything is mapped, relocated and initialised that comes
 * before main, and main is not called. Instead the process waits at the socket ZYGOTE_FD for what to start, forks, and in the fork main
 * is called with the arguments that came. That saves a machine the work of the loader, half of what QEMU's start takes, and the memory
 * that the loader wrote to, which all of them share.
 *
 * One request is one packet, of strings that end with a zero byte: the numbers that the descriptors which came along are to have,
 * separated by commas; the number of the descriptor to wait at before the VMM begins ("-1": none); the environment's variables, an empty
 * string after the last; stoker-shim's words up to "--", then the VMM's. The answer is one packet, the number of the shim's process, with a
 * descriptor of it, or "0 ERRNO".
 *
 * The fork is the shim: it forks again, for the VMM, and executes stoker-shim, whose child the VMM so is. Until the shim says who it is
 * (vmm_start.h) that child does nothing.
 *
 * All machines of one zygote have the same layout of addresses and the same stack protector: who breaks out of a guest by knowing
 * them knows those of the others. (zygote = 0 in the settings: no zygote.)
 *
 * It ends when the socket's other end is closed. In any program but the one it was made for (ZYGOTE_EXE) it does nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "vmm_start.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

enum { PACKET = 128 << 10, WORDS = 1024, FDS = 96 };

typedef int main_fn(int, char **, char **);
typedef void hook_fn(void);
typedef int first_fn(main_fn *, int, char **, hook_fn *, hook_fn *, hook_fn *, void *);

static char packet[PACKET];
static struct request {
	int fds[FDS], count, go;
	char *environment[WORDS + 1], *shim[WORDS + 8], *vmm[WORDS + 1];
	int shim_words;
} request;

/* The words of one packet, in turn. NULL: there is no more. */
static char *next_word(char **at, const char *end)
{
	char *word = *at;
	if (word >= end)
		return NULL;
	*at += strlen(word) + 1;
	return word;
}

static int read_words(size_t n, int *came, int count)
{
	char *at = packet, *end = packet + n, *numbers = next_word(&at, end), *go = next_word(&at, end), *word, *number;
	int i = 0, wanted[FDS];
	if (!n || packet[n - 1] || !numbers || !go)
		return EINVAL;
	while ((number = strsep(&numbers, ",")) && i < FDS)
		wanted[i++] = atoi(number);
	if (i != count || number)
		return EINVAL;
	request.go = atoi(go);
	request.count = count;
	for (i = 0; (word = next_word(&at, end)) && *word && i < WORDS; i++)
		request.environment[i] = word;
	request.environment[i] = NULL;
	for (i = 0; (word = next_word(&at, end)) && strcmp(word, "--") && i < WORDS; i++)
		request.shim[i] = word;
	request.shim_words = i;
	for (i = 0; (word = next_word(&at, end)) && i < WORDS; i++)
		request.vmm[i] = word;
	request.vmm[i] = NULL;
	if (at != end || !request.shim_words || !i)
		return EINVAL;
	/* Above all of them first: a number that one is to have may be another's now. */
	int above = 3;
	for (i = 0; i < count; i++)
		if (wanted[i] >= above)
			above = wanted[i] + 1;
	for (i = 0; i < count; i++) {
		int high = fcntl(came[i], F_DUPFD_CLOEXEC, above);
		close(came[i]);
		if (high < 0)
			return errno;
		came[i] = high;
		request.fds[i] = wanted[i];
	}
	return 0;
}

/* What ps and others see of the process: the kernel reads it where the first arguments were. */
static void show_arguments(char *place, size_t room)
{
	size_t used = 0;
	for (char **word = request.vmm; *word; word++) {
		size_t n = strlen(*word) + 1;
		if (n > room - used)
			break;
		memcpy(place + used, *word, n);
		used += n;
	}
	memset(place + used, 0, room - used);
	prctl(PR_SET_MM, PR_SET_MM_ARG_END, place + used, 0, 0); /* for those who may; others have zeros at the end */
}

/* The VMM's process. Returns when it may begin. */
static void wait_for_orders(int fd, pid_t shim)
{
	struct start s;
	int fds[3] = {-1, -1, -1}, keep[MAX_PASS + 3], n = 0;
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof fds)];
	} control = {0};
	struct iovec into = {&s, sizeof s};
	struct msghdr message = {.msg_iov = &into, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t got;
	while ((got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
		;
	if (got != sizeof s || control.head.cmsg_type != SCM_RIGHTS)
		_exit(125);
	memcpy(fds, CMSG_DATA(&control.head), control.head.cmsg_len - CMSG_LEN(0));
	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0)
			keep[n++] = fds[i];
	for (int i = 0; i < s.passed; i++)
		keep[n++] = s.pass_fds[i];
	close_all_but(keep, n);
	become_vmm(&s, shim, fds[0], fds[1], fds[2]);
	/* Its files in /proc are its own again, as they are after an exec. */
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

/* In the fork that becomes the shim; in the one that becomes the VMM this returns. */
static void be_shim(const int *came, char *place, size_t room)
{
	int pair[2];
	char pid[16], fd[16], byte;
	setsid();
	for (int i = 0; i < request.count; i++)
		if (dup2(came[i], request.fds[i]) < 0)
			_exit(125);
	for (int i = 0; i < request.count; i++)
		close(came[i]);
	/* What is started from here on is where somebody has put us meanwhile. */
	if (request.go >= 0 && (read(request.go, &byte, 1) != 1 || close(request.go)))
		_exit(0);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		_exit(125);
	pid_t self = getpid(), vmm = fork();
	if (vmm == 0) {
		close(pair[0]);
		show_arguments(place, room);
		wait_for_orders(pair[1], self);
		return;
	}
	if (vmm < 0)
		_exit(125);
	close(pair[1]);
	snprintf(pid, sizeof pid, "%d", (int)vmm);
	snprintf(fd, sizeof fd, "%d", pair[0]);
	const char *const more[] = {"--vmm-pid", pid, "--vmm-fd", fd, "--"};
	char **at = request.shim + request.shim_words;
	for (size_t i = 0; i < sizeof more / sizeof *more; i++)
		*at++ = (char *)more[i];
	*at++ = request.vmm[0];
	*at = NULL;
	execve(request.shim[0], request.shim, request.environment);
	_exit(125);
}

static void answer(int fd, pid_t pid, int error)
{
	char text[32];
	int process = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof process)];
	} control = {.head = {.cmsg_len = CMSG_LEN(sizeof process), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	if (process < 0 && pid > 0) {
		error = errno;
		kill(pid, SIGKILL);
	}
	memcpy(CMSG_DATA(&control.head), &process, sizeof process);
	int n = process < 0 ? snprintf(text, sizeof text, "0 %d", error) : snprintf(text, sizeof text, "%d", (int)pid);
	struct iovec from = {text, (size_t)n};
	struct msghdr message = {.msg_iov = &from, .msg_iovlen = 1, .msg_control = process < 0 ? NULL : &control, .msg_controllen = process < 0 ? 0 : sizeof control};
	if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0)
		_exit(0);
	if (process >= 0)
		close(process);
}

/* Returns in a VMM. */
static void serve(int fd, char *place, size_t room)
{
	static union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int) * FDS)];
	} control;
	/* Nobody here waits for a shim: whoever asked has a descriptor of it. */
	signal(SIGCHLD, SIG_IGN);
	umask(077);
	setsid();
	if (chdir("/"))
		_exit(125);
	answer(fd, 0, 0);
	for (;;) {
		int came[FDS], count = 0;
		struct iovec into = {packet, sizeof packet};
		struct msghdr message = {.msg_iov = &into, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
		ssize_t n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(0);
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
			if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
				count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
				memcpy(came, CMSG_DATA(c), sizeof(int) * (size_t)count);
			}
		int error = message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? E2BIG : read_words((size_t)n, came, count);
		pid_t pid = error ? 0 : fork();
		if (!error && pid == 0) {
			close(fd);
			be_shim(came, place, room);
			return;
		}
		if (pid < 0)
			error = errno;
		for (int i = 0; i < count; i++)
			close(came[i]);
		answer(fd, pid, error);
	}
}

int __libc_start_main(main_fn *start, int argc, char **argv, hook_fn *init, hook_fn *fini, hook_fn *linker, void *stack)
{
	first_fn *first = (first_fn *)dlsym(RTLD_NEXT, "__libc_start_main");
	const char *number = getenv("ZYGOTE_FD"), *program = getenv("ZYGOTE_EXE");
	char exe[4096];
	ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
	if (!number || !program || n < 0 || (exe[n] = 0, strcmp(exe, program)))
		return first(start, argc, argv, init, fini, linker, stack);
	/* One argument after another, and nothing else: that is the room for those to come. */
	char *place = argv[0], *last = argv[argc - 1];
	serve(atoi(number), place, (size_t)(last + strlen(last) + 1 - place));
	/* A library finds the environment behind the arguments, or has found it already. */
	int words = 0, variables = 0;
	while (request.vmm[words])
		words++;
	while (request.environment[variables])
		variables++;
	char **all = malloc(sizeof *all * (size_t)(words + variables + 2));
	if (!all)
		_exit(125);
	memcpy(all, request.vmm, sizeof *all * (size_t)(words + 1));
	memcpy(all + words + 1, request.environment, sizeof *all * (size_t)(variables + 1));
	environ = all + words + 1;
	return first(start, words, all, init, fini, linker, stack);
}
