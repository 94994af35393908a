/* `init: "image"`: process 1 goes on as the image's own init, and the agent lives on beside it, as a child with the channel. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char INIT[] = "/sbin/init", GROUP[] = "/sys/fs/cgroup/stoker-agent";

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, text, strlen(text)) > 0;
	if (fd >= 0)
		close(fd);
	return ok;
}

static bool check_init(struct failure *f)
{
	struct stat st;
	if (stat(INIT, &st))
		return fail(f, "no_init", errno, "the image has no %s: %s", INIT, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return fail(f, "no_init", S_ISDIR(st.st_mode) ? EISDIR : EINVAL, "the image's %s is %s", INIT,
			    S_ISDIR(st.st_mode) ? "a directory" : "no regular file");
	if (access(INIT, X_OK))
		return fail(f, "no_init", errno, "the image's %s cannot be run: %s", INIT, strerror(errno));
	/* They would become the image's init's, and we should never hear how they end. */
	if (processes_running)
		return fail(f, "bad_request", EBUSY, "init: %u processes run already", processes_running);
	return true;
}

/* Process 1, as the kernel would have started it: its environment, no signal blocked or ignored, its limits, and no descriptor of
 * ours (all of them close on exec). An init that cannot be run is told to the child, which answers the host. */
static _Noreturn void become_init(int report, pid_t child)
{
	static char *const argv[] = {(char *)INIT, NULL}, *const environment[] = {(char *)"HOME=/", (char *)"TERM=linux", NULL};
	char path[64], number[16];
	sigset_t none;
	/* Whoever takes the machine over moves everybody out of the root group into one of its own, and ends that one with it. */
	text_format(path, sizeof path, "%s/cgroup.procs", GROUP);
	text_format(number, sizeof number, "%d", (int)child);
	if (mkdir(GROUP, 0755) == 0 || errno == EEXIST)
		put(path, number);
	limits_restore();
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execve(INIT, argv, environment);
	int error = errno;
	if (write(report, &error, sizeof error) < 0)
		_exit(1);
	close(report);
	for (;;)
		if (waitpid(-1, NULL, 0) < 0)
			pause();
}

bool hand_over(struct failure *f)
{
	int report[2], error = 0;
	if (!check_init(f))
		return false;
	if (pipe2(report, O_CLOEXEC))
		return fail(f, "io", errno, "no pipe: %s", strerror(errno));
	pid_t child = fork();
	if (child > 0)
		become_init(report[1], child);
	close(report[1]);
	if (child == 0) {
		setsid();
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
		/* What systemd leaves alone when it ends everything at a shutdown: the host has to hear of it to the last. */
		agent.name[0] = '@';
		put("/proc/self/oom_score_adj", "-1000");
		agent.beside = true;
		signals_watch();
		if (read(report[0], &error, sizeof error) == sizeof error)
			fail(f, "no_init", error, "the image's %s cannot be run: %s", INIT, strerror(error));
	} else {
		fail(f, "io", errno, "cannot start a second process: %s", strerror(errno));
	}
	close(report[0]);
	return child == 0 && !error;
}

/* SIGRTMIN + 4 and + 5 as systemd's C library counts, which keeps two real-time signals for itself; ours keeps three. */
enum { SYSTEMD_POWEROFF = 38, SYSTEMD_REBOOT = 39 };

/* systemd understands these two signals from whoever may send them; other inits know busybox's words. */
void init_ask(bool reboot_it)
{
	char program[PATH_ROOM];
	ssize_t n = readlink("/proc/1/exe", program, sizeof program - 1);
	program[n > 0 ? n : 0] = 0;
	const char *name = strrchr(program, '/');
	if (name && !strcmp(name, "/systemd"))
		kill(1, reboot_it ? SYSTEMD_REBOOT : SYSTEMD_POWEROFF);
	else
		kill(1, reboot_it ? SIGTERM : SIGUSR2);
}
