/* The table of processes, and what is done for each of them in a round of the loop. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUCKETS = 1024 };

struct process *processes_first;
unsigned processes_running;
static struct process *last, *by_id[BUCKETS], *by_pid[BUCKETS];
static struct process *ended_first, *ended_last;
static unsigned ended_count;
static size_t ended_held;
static struct process *busy, *dropped;
static uint64_t oom_kills;

struct process *process_find(uint32_t id)
{
	struct process *p = by_id[id % BUCKETS];
	while (p && p->id != id)
		p = p->next_id;
	return p;
}

static struct process *find_pid(pid_t pid)
{
	struct process *p = by_pid[(unsigned)pid % BUCKETS];
	while (p && p->pid != pid)
		p = p->next_pid;
	return p;
}

struct process *process_new(uint32_t id)
{
	/* One that is never used keeps the heap of the others from being unmapped with the last of them. */
	static struct process *kept;
	if (!kept)
		kept = malloc(sizeof *kept);
	struct process *p = calloc(1, sizeof *p);
	if (!p)
		return NULL;
	p->id = id;
	p->in.watch.fd = p->out.watch.fd = p->err.watch.fd = -1;
	return p;
}

/* Ids ascend as the host counts, so the place is nearly always the end. */
void process_started(struct process *p, pid_t pid)
{
	p->pid = pid;
	p->running = true;
	struct process *after = last;
	while (after && after->id > p->id)
		after = after->previous;
	p->previous = after;
	p->next = after ? after->next : processes_first;
	*(after ? &after->next : &processes_first) = p;
	*(p->next ? &p->next->previous : &last) = p;
	p->next_id = by_id[p->id % BUCKETS];
	by_id[p->id % BUCKETS] = p;
	process_busy(p);
	if (is_connection(p))
		return;
	processes_running++;
	p->next_pid = by_pid[(unsigned)pid % BUCKETS];
	by_pid[(unsigned)pid % BUCKETS] = p;
}

void process_busy(struct process *p)
{
	if (!p->busy) {
		p->busy = true;
		p->next_busy = busy;
		busy = p;
	}
}

static void forget_pid(struct process *p)
{
	struct process **at = &by_pid[(unsigned)p->pid % BUCKETS];
	while (*at && *at != p)
		at = &(*at)->next_pid;
	if (*at)
		*at = p->next_pid;
}

static void leave_ended(struct process *p)
{
	*(p->previous_ended ? &p->previous_ended->next_ended : &ended_first) = p->next_ended;
	*(p->next_ended ? &p->next_ended->previous_ended : &ended_last) = p->previous_ended;
	p->next_ended = p->previous_ended = NULL;
	ended_count--;
	ended_held -= p->held;
}

void process_drop(struct process *p)
{
	if (p->finished)
		leave_ended(p);
	struct process **at = &by_id[p->id % BUCKETS];
	while (*at != p)
		at = &(*at)->next_id;
	*at = p->next_id;
	*(p->previous ? &p->previous->next : &processes_first) = p->next;
	*(p->next ? &p->next->previous : &last) = p->previous;
	input_free(&p->in);
	output_free(&p->out);
	output_free(&p->err);
	p->dropped = true;
	p->next = dropped; /* an event of this round may still point here */
	dropped = p;
}

void processes_swept(void)
{
	while (dropped) {
		struct process *p = dropped;
		dropped = p->next;
		if (p->busy) {
			struct process **at = &busy;
			while (*at != p)
				at = &(*at)->next_busy;
			*at = p->next_busy;
		}
		free(p);
	}
}

static size_t held_by(const struct output *o)
{
	return o->ring ? (o->head < o->size ? (size_t)o->head : o->size) : 0;
}

static void remember_ended(struct process *p)
{
	p->finished = true;
	p->held = held_by(&p->out) + held_by(&p->err);
	p->previous_ended = ended_last;
	*(ended_last ? &ended_last->next_ended : &ended_first) = p;
	ended_last = p;
	ended_count++;
	ended_held += p->held;
	while ((ended_count > PROCESSES_ENDED || ended_held > ENDED_RINGS) && ended_first != p)
		process_drop(ended_first);
}

/* The kernel counts its OOM kills; a process that died by SIGKILL just when the number rose was most likely one of them (or
 * is a shell that says so of its child). */
static bool killed_for_memory(int status)
{
	bool killed = WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL : WEXITSTATUS(status) == 128 + SIGKILL;
	if (!killed)
		return false;
	static char text[8192];
	read_small("/proc/vmstat", text, sizeof text);
	const char *at = text_find(text, "\noom_kill ");
	uint64_t kills = at ? text_number(at + 10, NULL) : 0;
	bool rose = kills > oom_kills;
	oom_kills = kills;
	return rose;
}

static bool reap_one(void)
{
	int status;
	struct rusage usage;
	pid_t pid = wait4(-1, &status, WNOHANG, &usage);
	if (pid <= 0)
		return false;
	power_sync_ended(pid);
	hooks_ended(pid, status);
	struct process *p = find_pid(pid);
	if (!p)
		return true; /* an orphan */
	forget_pid(p);
	p->running = false;
	processes_running--;
	p->status = status;
	p->usage = usage;
	p->ended_ns = now_ns();
	p->oom = killed_for_memory(status);
	/* Nobody but a terminal's own descendants reads standard input now; a pipe's buffered rest is theirs too. */
	process_busy(p);
	return true;
}

void processes_reap(void)
{
	while (reap_one())
		;
}

bool processes_left(void)
{
	processes_reap();
	siginfo_t info;
	return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 || errno != ECHILD;
}

static uint64_t microseconds(const struct timeval *t)
{
	return (uint64_t)t->tv_sec * 1000000u + (uint64_t)t->tv_usec;
}

static void describe_exit(struct mp_writer *w, const struct process *p)
{
	mpw_map(w, 10);
	mpw_key_str(w, "e", "exit");
	mpw_str(w, "code");
	WIFEXITED(p->status) ? mpw_int(w, WEXITSTATUS(p->status)) : mpw_nil(w);
	mpw_str(w, "signal");
	WIFSIGNALED(p->status) ? mpw_int(w, WTERMSIG(p->status)) : mpw_nil(w);
	mpw_key_bool(w, "core", WIFSIGNALED(p->status) && WCOREDUMP(p->status));
	mpw_key_uint(w, "out", p->out.head);
	mpw_key_uint(w, "err", p->err.head);
	mpw_key_uint(w, "user_us", microseconds(&p->usage.ru_utime));
	mpw_key_uint(w, "sys_us", microseconds(&p->usage.ru_stime));
	mpw_key_uint(w, "max_rss_kb", (uint64_t)p->usage.ru_maxrss);
	mpw_key_uint(w, "duration_us", (p->ended_ns - p->started_ns) / 1000);
}

static void send_exit(struct process *p)
{
	uint8_t buffer[256];
	struct mp_writer w;
	if (p->oom) {
		static const uint8_t event[] = {0x81, 0xa1, 'e', 0xa3, 'o', 'o', 'm'};
		if (!channel_send(FRAME_EVENT, p->id, 0, event, sizeof event))
			return;
		p->oom = false;
	}
	mpw_init(&w, buffer, sizeof buffer);
	describe_exit(&w, p);
	p->exit_sent = channel_send(FRAME_EVENT, p->id, 0, buffer, w.length);
}

/* A descendant may hold a pipe for ever: once the process has ended, silence for a while ends the stream too. True: not silent. */
static bool give_up_quiet(struct process *p, struct output *o, uint64_t now)
{
	if (!o->open || o->readable)
		return false;
	uint64_t since = o->last_ns > p->ended_ns ? o->last_ns : p->ended_ns, until = since + QUIET_MS * 1000000ull;
	if (now < until) {
		wake_at(until);
		return false;
	}
	/* Among hundreds of others on a busy machine its event may not have had its turn: the pipe itself knows. */
	o->readable = true;
	if (output_read(o))
		return true;
	if (o->open && !o->readable)
		output_close(o);
	return false;
}

/* One turn for one process. True: it can go on at once. */
static bool work(struct process *p)
{
	bool more = false;
	struct output *outputs[2] = {&p->out, &p->err};
	if (p->connecting && !connection_made(p))
		return false;
	input_work(&p->in);
	for (int i = 0; i < 2; i++) {
		more |= output_read(outputs[i]);
		more |= output_send(outputs[i]);
	}
	if (is_connection(p) && !p->out.open && !p->in.open)
		p->running = false;
	if (!p->running && !p->finished) {
		uint64_t now = now_ns();
		more |= give_up_quiet(p, &p->out, now);
		more |= give_up_quiet(p, &p->err, now);
		if (!p->out.open && !p->err.open) {
			input_close(&p->in);
			p->in.gone = p->in.gone_told = true;
			remember_ended(p);
			more = true;
		}
	}
	if (p->finished && !p->exit_sent && channel_synced()) {
		bool waits = (p->out.attached && !p->out.eof_sent) || (p->err.attached && !p->err.eof_sent);
		if (!waits)
			send_exit(p);
	}
	return more;
}

/* What a process still needs from outside shows as an event, an acknowledgement or a writable port; until then it rests.
 * While the port takes nothing, those with something to send stay in the list, without making the loop spin. */
static bool waits_for_port(const struct process *p)
{
	const struct output *outputs[2] = {&p->out, &p->err};
	for (int i = 0; i < 2; i++)
		if (outputs[i]->attached && (outputs[i]->sent < outputs[i]->head || (!outputs[i]->open && !outputs[i]->eof_sent)))
			return true;
	return (p->finished && !p->exit_sent) || (!p->running && !p->finished) || (!p->in.gone && p->in.acked < p->in.taken) ||
	       (p->in.gone && (!p->in.gone_told || p->in.acked < p->in.wanted));
}

bool processes_work(void)
{
	bool more = false;
	struct process *todo = busy, *next;
	busy = NULL;
	for (struct process *p = todo; p; p = next) {
		next = p->next_busy;
		p->busy = false;
		/* One that is not known any more would be remembered as ended, and then freed. */
		bool again = !p->dropped && work(p);
		more |= again;
		if (!p->dropped && (again || waits_for_port(p)))
			process_busy(p);
	}
	return more;
}

void processes_detach_all(void)
{
	for (struct process *p = processes_first; p; p = p->next)
		p->out.attached = p->err.attached = false;
}

void process_attach(struct process *p, const uint64_t *out, const uint64_t *err)
{
	output_attach(&p->out, out);
	output_attach(&p->err, err);
	p->in.acked = p->in.taken;
	p->exit_sent = false; /* once more behind the streams' ends */
	process_busy(p);
}

void process_describe(struct mp_writer *w, const struct process *p, bool whole)
{
	mpw_map(w, whole ? 11 : 5);
	mpw_key_uint(w, "id", p->id);
	mpw_key_uint(w, "pid", (uint64_t)p->pid);
	mpw_key_str(w, "tag", p->tag);
	mpw_key_bool(w, "running", !p->finished);
	mpw_key_bool(w, "pty", p->pty);
	if (!whole)
		return;
	mpw_key_uint(w, "stdin", p->in.wanted);
	mpw_key_uint(w, "out", p->out.head);
	mpw_key_uint(w, "err", p->err.head);
	mpw_key_uint(w, "out_oldest", output_oldest(&p->out));
	mpw_key_uint(w, "err_oldest", output_oldest(&p->err));
	mpw_str(w, "exit");
	p->finished ? describe_exit(w, p) : mpw_nil(w);
}

int process_signal(struct process *p, int number, bool group)
{
	if (!p->running || is_connection(p))
		return ESRCH; /* its number may belong to another by now */
	if (group && kill(-p->pid, number) == 0)
		return 0;
	/* An applet is forked, and leads no group until it has come to its setsid. */
	if (group && errno != ESRCH)
		return errno;
	return kill(p->pid, number) ? errno : 0;
}

int process_resize(struct process *p, unsigned rows, unsigned columns)
{
	struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
	if (!p->pty || !p->out.open)
		return ENOTTY;
	return ioctl(p->out.watch.fd, TIOCSWINSZ, &size) ? errno : 0;
}
