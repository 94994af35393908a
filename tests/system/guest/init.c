/* An image's own init for tests: says in /report what it was started with, reaps, and obeys the two words of busybox's init.
 * With an argument it is an ordinary program that says the same of itself, and what the kernel's killer thinks of it. */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* The lines of a file, or those that begin with one of two words. */
static void copy(FILE *to, const char *path, const char *one, const char *other)
{
	char line[512];
	FILE *from = fopen(path, "r");
	while (from && fgets(line, sizeof line, from))
		if (!one || !strncmp(line, one, strlen(one)) || !strncmp(line, other, strlen(other)))
			fputs(line, to);
	if (from)
		fclose(from);
}

static void report(FILE *to, char **argv)
{
	struct rlimit files;
	fprintf(to, "pid %d\nargv %s\n", (int)getpid(), argv[0]);
	for (char **e = environ; *e; e++)
		fprintf(to, "env %s\n", *e);
	for (int fd = 0; fd < 1024; fd++)
		if (fcntl(fd, F_GETFD) >= 0 && fd != fileno(to))
			fprintf(to, "fd %d\n", fd);
	getrlimit(RLIMIT_NOFILE, &files);
	fprintf(to, "files %lu\n", (unsigned long)files.rlim_cur);
	copy(to, "/proc/self/status", "SigBlk", "SigIgn");
	copy(to, "/proc/self/cgroup", NULL, NULL);
}

int main(int argc, char **argv)
{
	sigset_t all;
	int number;
	if (argc > 1) {
		report(stdout, argv);
		copy(stdout, "/proc/self/oom_score_adj", NULL, NULL);
		return 0;
	}
	FILE *to = fopen("/report.new", "w");
	report(to, argv);
	fclose(to);
	rename("/report.new", "/report");
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	for (;;) {
		sigwait(&all, &number);
		if (number == SIGCHLD) {
			while (waitpid(-1, NULL, WNOHANG) > 0)
				;
		} else if (number == SIGUSR2 || number == SIGTERM) {
			close(open(number == SIGUSR2 ? "/asked-poweroff" : "/asked-reboot", O_CREAT | O_WRONLY, 0644));
			if (access("/deaf", F_OK) == 0)
				continue;
			sync();
			reboot(number == SIGUSR2 ? RB_POWER_OFF : RB_AUTOBOOT);
		}
	}
}
