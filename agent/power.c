/* The ways out: sync, shutdown, and the last instruction. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

enum { GRACE_MAX = 600000, AFTER_KILL_MS = 2000 };

static enum { RUNNING, ASKED, KILLED } stage;
static bool reboot_it;
static uint64_t deadline;

static struct {
	pid_t pid;
	uint32_t request;
	uint64_t generation;
} syncing[16];

/* sync(2) may take long, and everything else goes on meanwhile. */
void call_sync(uint32_t request)
{
	for (size_t i = 0; i < sizeof syncing / sizeof *syncing; i++) {
		if (syncing[i].pid)
			continue;
		pid_t pid = fork();
		if (pid == 0) {
			sync();
			_exit(0);
		}
		if (pid < 0)
			break;
		syncing[i].pid = pid;
		syncing[i].request = request;
		syncing[i].generation = channel_generation;
		return;
	}
	reply_error(request, "too_many", EAGAIN, "too many syncs at once");
}

void power_sync_ended(pid_t pid)
{
	for (size_t i = 0; i < sizeof syncing / sizeof *syncing; i++)
		if (syncing[i].pid == pid) {
			syncing[i].pid = 0;
			if (syncing[i].generation == channel_generation)
				reply_empty(syncing[i].request);
		}
}

void power_request(bool again, uint64_t grace_ms)
{
	if (stage == RUNNING) {
		reboot_it = again;
		stage = ASKED;
		deadline = now_ns() + (grace_ms < GRACE_MAX ? grace_ms : GRACE_MAX) * 1000000u;
		if (agent.beside) {
			init_ask(again);
		} else if (agent.mode == MODE_INIT) {
			kill(-1, SIGTERM);
			kill(-1, SIGHUP); /* what ends an interactive shell */
			kill(-1, SIGCONT);
		} else {
			for (struct process *p = processes_first; p; p = p->next)
				process_signal(p, SIGTERM, true);
		}
	}
	wake_at(deadline);
}

void call_shutdown(uint32_t request, const struct mp *m)
{
	struct mp how = mp_get(m, "how");
	bool again = mp_text_is(&how, "reboot");
	if (!again && how.type != MP_MISSING && !mp_text_is(&how, "poweroff")) {
		reply_error(request, "bad_request", EINVAL, "how is poweroff or reboot");
		return;
	}
	reply_empty(request);
	channel_flush();
	power_request(again, mp_u64_or(m, "grace", 5000, GRACE_MAX));
}

/* In reverse order of mounting; what is still busy becomes read-only. */
static void unmount_all(void)
{
	static struct mount_line lines[512];
	unsigned n = mount_lines(lines, 512);
	while (n--) {
		const char *type = lines[n].type;
		/* Memory only, or in use by ourselves. */
		if (!strncmp(type, "proc", 4) || !strncmp(type, "sysfs", 5) || !strncmp(type, "devtmpfs", 8) || !strncmp(type, "tmpfs", 5) ||
		    !strncmp(type, "cgroup", 6) || !strncmp(type, "devpts", 6))
			continue;
		if (strcmp(lines[n].target, "/") == 0 || umount2(lines[n].target, 0))
			mount(NULL, lines[n].target, NULL, MS_REMOUNT | MS_RDONLY, NULL);
	}
}

void power_off_now(bool again)
{
	sync();
	/* Without ACPI there is nothing to switch off, and the kernel would halt for ever: a reset ends the VMM too. */
	reboot(again || access("/sys/firmware/acpi", F_OK) ? RB_AUTOBOOT : RB_POWER_OFF);
	for (;;)
		pause();
}

bool power_work(void)
{
	if (stage == RUNNING)
		return false;
	uint64_t now = now_ns();
	/* The image's init ends everything in its own order and switches off; we only when it takes too long. */
	if ((processes_left() || (agent.beside && stage == ASKED)) && now < deadline) {
		wake_at(deadline);
		return false;
	}
	if (stage == ASKED && (agent.beside || processes_left())) {
		stage = KILLED;
		deadline = now + AFTER_KILL_MS * 1000000ull;
		if (agent.mode == MODE_INIT)
			kill(-1, SIGKILL);
		else
			for (struct process *p = processes_first; p; p = p->next)
				process_signal(p, SIGKILL, true);
		wake_at(deadline);
		return false;
	}
	if (agent.mode == MODE_INIT) {
		sync();
		unmount_all();
		power_off_now(reboot_it);
	}
	agent.leaving = true;
	return false;
}
