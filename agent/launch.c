/* The child's side of a start, between clone and exec. The child shares the agent's memory (a copy of the page tables would
 * be the dearest part of a short command) on a stack of its own, while the agent waits. So: system calls only, no library
 * function that keeps state, and nothing of the agent's is written but what `struct launch` says. Never built with
 * sanitizers, which do not know such children. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static bool failed(struct launch *l, const char *stage)
{
	l->error = errno;
	l->stage = stage;
	return false;
}

/* Raw: the library's versions want to tell other threads, and there are none. */
static bool become(const struct account *a)
{
	return !syscall(SYS_setgroups, (size_t)a->group_count, a->groups) && !syscall(SYS_setresgid, a->gid, a->gid, a->gid) &&
	       !syscall(SYS_setresuid, a->uid, a->uid, a->uid);
}

static bool place(int fd, int where)
{
	if (fd == where)
		return fcntl(fd, F_SETFD, 0) == 0;
	return dup2(fd, where) == where;
}

bool launch_prepare(struct launch *l)
{
	struct rlimit files = {1024, 524288};
	setsid();
	if (l->tty && ioctl(l->in, TIOCSCTTY, 0))
		return failed(l, "terminal");
	if (!place(l->in, 0) || !place(l->out, 1) || !place(l->err, 2))
		return failed(l, "descriptors");
	umask(l->mask);
	setrlimit(RLIMIT_NOFILE, &files);
	for (unsigned i = 0; i < l->limit_count; i++)
		if (setrlimit(l->limits[i].resource, &l->limits[i].value))
			return failed(l, "limits");
	/* What protects the agent from the kernel's killer is not for what it starts. (Process 1 needs no such protection.) */
	if (agent.beside) {
		int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
		if (fd < 0 || write(fd, "0", 1) != 1)
			return failed(l, "limits");
		close(fd);
	}
	/* An ordinary user running the agent on a host can only be itself. */
	if (agent.mode == MODE_INIT || geteuid() == 0 || l->account->uid != geteuid() || l->account->gid != getegid())
		if (!become(l->account))
			return failed(l, "user");
	if ((l->workdir && chdir(l->workdir)) || (l->cwd && chdir(l->cwd)))
		return failed(l, "directory");
	return true;
}

static void reset_signals(void)
{
	struct sigaction standard = {.sa_handler = SIG_DFL};
	sigset_t none;
	/* Nothing but SIGPIPE was ever changed. */
	sigaction(SIGPIPE, &standard, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* A shell runs what the kernel does not know as a script, unless it looks like a binary. */
static bool looks_binary(const char *path)
{
	char head[80];
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	ssize_t n = fd < 0 ? 0 : read(fd, head, sizeof head);
	if (fd >= 0)
		close(fd);
	for (ssize_t i = 0; i < n && head[i] != '\n'; i++)
		if (!head[i])
			return true;
	return false;
}

static void try_exec(struct launch *l, const char *path)
{
	execve(path, l->argv, l->environment);
	if (errno == ENOEXEC && !looks_binary(path)) {
		char **shell = l->argv - 1, *name = l->argv[0];
		shell[0] = (char *)"/bin/sh";
		shell[1] = (char *)path;
		execve("/bin/sh", shell, l->environment);
		l->argv[0] = name;
		errno = ENOEXEC;
	}
}

static void search_and_exec(struct launch *l, char path[PATH_ROOM])
{
	const char *name = l->argv[0];
	size_t length = strlen(name);
	int error = ENOENT;
	for (const char *at = l->search;; at++) {
		const char *end = strchr(at, ':');
		size_t n = end ? (size_t)(end - at) : strlen(at);
		if (n + length + 2 <= PATH_ROOM) {
			/* An empty entry is the current directory. */
			memcpy(path, at, n);
			if (n)
				path[n++] = '/';
			memcpy(path + n, name, length + 1);
			try_exec(l, path);
			if (errno != ENOENT && errno != ENOTDIR && errno != EACCES) {
				error = errno;
				l->tried = path;
				break;
			}
			struct stat st;
			/* Found, but it may not be run, or what should run it is missing: worth saying if nothing better comes. */
			int why = errno;
			if (error == ENOENT && l->stage == NULL && stat(path, &st) == 0 && S_ISREG(st.st_mode)) {
				error = why == ENOENT ? ELIBACC : why;
				if (error == ELIBACC)
					break;
			}
		}
		if (!end)
			break;
		at = end;
	}
	errno = error;
}

int launch_run(void *argument)
{
	struct launch *l = argument;
	char path[PATH_ROOM];
	struct stat st;
	if (!launch_prepare(l))
		_exit(127);
	reset_signals();
	if (strchr(l->argv[0], '/')) {
		try_exec(l, l->argv[0]);
		if (errno == ENOENT && stat(l->argv[0], &st) == 0)
			errno = ELIBACC;
	} else {
		search_and_exec(l, path);
	}
	failed(l, "exec");
	_exit(127);
}

pid_t launch_start(struct launch *l)
{
	static _Alignas(16) char stack[64 << 10];
	l->stage = NULL;
	pid_t pid = clone(launch_run, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, l);
	if (pid < 0) {
		failed(l, "fork");
	} else if (l->stage) {
		/* It never became a program, so it is nobody's child to hear of. */
		waitpid(pid, NULL, 0);
		pid = -1;
	}
	return pid;
}
