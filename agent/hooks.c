/* The guest's own hooks: the executables of a directory, in the order of their names, one after the other, each for a limited time. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	HOOKS_MAX = 64,
	HOOK_NAME = 64,
	HOOK_OUTPUT = 400,    /* of each, its last bytes */
	HOOK_KILL_MS = 2000, /* a process that SIGKILL does not end by then is left behind */
};

static struct {
	char names[HOOKS_MAX][HOOK_NAME];
	unsigned count, next;
	char directory[128], kind[64];
	uint64_t limit_ns, started_ns, deadline;
	pid_t pid; /* of the one that runs */
	bool killed, ended;
	int status;
	struct watch output;
	char kept[HOOK_OUTPUT + 1];
	size_t held;
	bool cut;
} hooks;

static int by_name(const void *a, const void *b)
{
	return strcmp(a, b);
}

/* Executable files with a plain name; more than there is room for are told, not run. */
static void list(void)
{
	DIR *d = opendir(hooks.directory);
	hooks.count = hooks.next = 0;
	for (struct dirent *e; d && (e = readdir(d));) {
		struct stat st;
		char path[256];
		size_t n = strlen(e->d_name);
		if (e->d_name[0] == '.' || e->d_name[n - 1] == '~')
			continue;
		text_format(path, sizeof path, "%s/%.100s", hooks.directory, e->d_name);
		if (n >= HOOK_NAME || stat(path, &st) || !S_ISREG(st.st_mode) || !(st.st_mode & 0111) || hooks.count == HOOKS_MAX)
			report_hazard("hooks", n < HOOK_NAME && hooks.count < HOOKS_MAX, "%.64s is not run: %s", e->d_name,
				      n >= HOOK_NAME ? "its name is too long" : hooks.count == HOOKS_MAX ? "there are too many" : "it is no executable file");
		else
			memcpy(hooks.names[hooks.count++], e->d_name, n + 1);
	}
	if (d)
		closedir(d);
	qsort(hooks.names, hooks.count, HOOK_NAME, by_name);
}

static void on_output(struct watch *w, uint32_t events)
{
	(void)events;
	char data[4096];
	ssize_t n;
	/* At most this much in one round: a hook may write for ever. */
	for (int i = 0; i < 64 && (n = read(w->fd, data, sizeof data)) > 0; i++) {
		size_t take = (size_t)n < HOOK_OUTPUT ? (size_t)n : HOOK_OUTPUT, drop = hooks.held + take > HOOK_OUTPUT ? hooks.held + take - HOOK_OUTPUT : 0;
		hooks.cut |= drop > 0 || (size_t)n > take;
		memmove(hooks.kept, hooks.kept + drop, hooks.held - drop);
		memcpy(hooks.kept + hooks.held - drop, data + n - take, take);
		hooks.held += take - drop;
	}
	if (n > 0)
		wake_at(now_ns()); /* edge-triggered: there is more */
}

static void run_next(void)
{
	char path[256], *argv[4] = {NULL, path, hooks.kind, NULL};
	static char path_variable[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", home[] = "HOME=/root";
	char *environment[] = {path_variable, home, NULL};
	static const struct account root = {.known = true};
	int pipes[2] = {-1, -1}, null = open("/dev/null", O_RDWR | O_CLOEXEC);
	text_format(path, sizeof path, "%s/%s", hooks.directory, hooks.names[hooks.next]);
	hooks.held = 0;
	hooks.killed = hooks.ended = hooks.cut = false;
	hooks.started_ns = now_ns();
	hooks.deadline = hooks.started_ns + hooks.limit_ns;
	hooks.pid = -1;
	/* Nobody but root owns what a host's own tests run. */
	static struct account own;
	own = root;
	own.uid = geteuid();
	own.gid = getegid();
	struct launch l = {.argv = argv + 1, .environment = environment, .search = "", .cwd = "/", .account = &own, .mask = 022, .in = null};
	if (null >= 0 && pipe2(pipes, O_CLOEXEC) == 0 && fcntl(pipes[0], F_SETFL, O_NONBLOCK) == 0) {
		l.out = l.err = pipes[1];
		hooks.pid = launch_start(&l);
	} else {
		l.error = errno;
	}
	if (hooks.pid > 0) {
		hooks.output = (struct watch){.ready = on_output, .fd = pipes[0]};
		watch_add(&hooks.output, EPOLLIN);
	} else {
		report_hazard_named("hook:", hooks.names[hooks.next++], false, "cannot be started: %s", strerror(l.error));
		if (pipes[0] >= 0)
			close(pipes[0]);
	}
	if (pipes[1] >= 0)
		close(pipes[1]);
	if (null >= 0)
		close(null);
}

static void tell(void)
{
	char how[64];
	uint64_t ms = (now_ns() - hooks.started_ns) / 1000000u;
	bool ok = hooks.ended && !hooks.killed && WIFEXITED(hooks.status) && WEXITSTATUS(hooks.status) == 0;
	if (hooks.killed)
		text_format(how, sizeof how, hooks.ended ? "killed after its time" : "cannot be killed");
	else if (WIFEXITED(hooks.status))
		text_format(how, sizeof how, "exit %d", WEXITSTATUS(hooks.status));
	else
		text_format(how, sizeof how, "signal %d", WTERMSIG(hooks.status));
	on_output(&hooks.output, 0);
	watch_close(&hooks.output);
	while (hooks.held && hooks.kept[hooks.held - 1] == '\n')
		hooks.held--;
	hooks.kept[hooks.held] = 0;
	report_hazard_named("hook:", hooks.names[hooks.next], ok, "%s after %lu ms%s%s%s", how, (unsigned long)ms, hooks.held ? ": " : "", hooks.cut ? "..." : "",
			    hooks.kept);
	hooks.pid = 0;
	hooks.next++;
}

bool hooks_begin(const char *directory, const char *kind, uint64_t limit_ms)
{
	text_format(hooks.directory, sizeof hooks.directory, "%s/%s", directory, kind);
	text_format(hooks.kind, sizeof hooks.kind, "%s", kind);
	hooks.limit_ns = limit_ms * 1000000u;
	list();
	return hooks.count > 0;
}

void hooks_ended(pid_t pid, int status)
{
	if (hooks.pid > 0 && pid == hooks.pid) {
		hooks.ended = true;
		hooks.status = status;
	}
}

void hooks_abandon(void)
{
	if (hooks.pid > 0) {
		kill(-hooks.pid, SIGKILL);
		watch_close(&hooks.output);
	}
	hooks.pid = 0;
	hooks.next = hooks.count;
}

bool hooks_work(void)
{
	for (;;) {
		if (hooks.pid > 0) {
			uint64_t now = now_ns();
			if (!hooks.ended && now < hooks.deadline) {
				wake_at(hooks.deadline);
				return true;
			}
			if (!hooks.ended && !hooks.killed) {
				/* The group is what it started and did not set free. */
				kill(-hooks.pid, SIGKILL);
				hooks.killed = true;
				hooks.deadline = now + HOOK_KILL_MS * 1000000ull;
				wake_at(hooks.deadline);
				return true;
			}
			tell();
		}
		if (hooks.next == hooks.count)
			return false;
		run_next();
	}
}
