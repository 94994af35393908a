/* `exec`: from the request's map to a running process. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

static const char DEFAULT_PATH[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

enum { LIMITS = 16 };

/* One request while it is worked on. The strings live in `arena`, sized from the request before anything is copied. */
struct request {
	uint64_t id, ring;
	const char *tag;
	bool tty, with_stdin, discard, attach, builtin;
	unsigned rows, columns;
	struct account account;
	struct limit limits[LIMITS];
	struct launch launch;
	struct mp args; /* of an applet; still in the channel's buffer, of which the child has its own copy */
	char *arena, *at, *end;
	char **pointers;
	unsigned environment_count;
};

static char *keep(struct request *q, const char *a, size_t n, const char *between, const char *b, size_t m)
{
	size_t k = strlen(between);
	if ((size_t)(q->end - q->at) < n + k + m + 1)
		return NULL;
	char *s = q->at;
	memcpy(s, a, n);
	memcpy(s + n, between, k);
	if (m)
		memcpy(s + n + k, b, m);
	s[n + k + m] = 0;
	q->at += n + k + m + 1;
	return s;
}

static char *keep_text(struct request *q, const struct mp *v)
{
	if (!mp_is_text(v) || memchr(v->data, 0, v->count))
		return NULL;
	return keep(q, (const char *)v->data, v->count, "", NULL, 0);
}

static char **environment_find(struct request *q, const char *name, size_t n)
{
	for (unsigned i = 0; i < q->environment_count; i++) {
		char *e = q->launch.environment[i];
		if (!strncmp(e, name, n) && e[n] == '=')
			return &q->launch.environment[i];
	}
	return NULL;
}

/* Sets or replaces one variable. */
static bool environment_set(struct request *q, const char *name, size_t n, const char *value, size_t m)
{
	char *entry = keep(q, name, n, "=", value, m), **there = environment_find(q, name, n);
	if (!entry || !n || memchr(name, '=', n) || memchr(name, 0, n) || (m && memchr(value, 0, m)))
		return false;
	if (there)
		*there = entry;
	else
		q->launch.environment[q->environment_count++] = entry;
	return true;
}

static bool environment_add_map(struct request *q, const struct mp *map)
{
	if (map->type != MP_MAP)
		return map->type == MP_MISSING || map->type == MP_NIL;
	const uint8_t *at = map->body;
	for (uint32_t i = 0; i < map->count; i++) {
		struct mp k = mp_next(map, &at), v = mp_next(map, &at);
		if (!mp_is_text(&k) || !mp_is_text(&v) ||
		    !environment_set(q, (const char *)k.data, k.count, (const char *)v.data, v.count))
			return false;
	}
	return true;
}

static void environment_default(struct request *q, const char *name, const char *value)
{
	if (!environment_find(q, name, strlen(name)))
		environment_set(q, name, strlen(name), value, strlen(value));
}

static bool environment_build(struct request *q, const struct mp *m)
{
	struct mp own = mp_get(m, "env");
	bool clear = mp_bool_or(m, "clear_env", false);
	if ((!clear && !environment_add_map(q, &configured_env)) || !environment_add_map(q, &own))
		return false;
	if (!clear) {
		environment_default(q, "PATH", DEFAULT_PATH);
		environment_default(q, "HOME", q->account.home);
		if (*q->account.name) {
			environment_default(q, "USER", q->account.name);
			environment_default(q, "LOGNAME", q->account.name);
		}
		environment_default(q, "SHELL", q->account.shell);
		if (q->tty)
			environment_default(q, "TERM", "xterm");
	}
	q->launch.environment[q->environment_count] = NULL;
	char **path = environment_find(q, "PATH", 4);
	q->launch.search = path ? *path + 5 : DEFAULT_PATH;
	return true;
}

static bool decode_argv(struct request *q, const struct mp *argv)
{
	const uint8_t *at = argv->body;
	for (uint32_t i = 0; i < argv->count; i++) {
		struct mp v = mp_next(argv, &at);
		if (!(q->launch.argv[i] = keep_text(q, &v)))
			return false;
	}
	q->launch.argv[argv->count] = NULL;
	return *q->launch.argv[0] != 0;
}

/* "~" and "~/x" are the user's home. */
static const char *decode_directory(struct request *q, const struct mp *v)
{
	const char *s = keep_text(q, v);
	if (s && s[0] == '~' && (!s[1] || s[1] == '/'))
		s = keep(q, q->account.home, strlen(q->account.home), "", s + 1, strlen(s + 1));
	return s;
}

static bool decode_limits(struct request *q, const struct mp *limits)
{
	if (limits->type != MP_ARRAY)
		return limits->type == MP_MISSING || limits->type == MP_NIL;
	const uint8_t *at = limits->body;
	for (uint32_t i = 0; i < limits->count; i++) {
		struct mp one = mp_next(limits, &at);
		if (one.type != MP_ARRAY || one.count != 3 || i >= LIMITS)
			return false;
		const uint8_t *in = one.body;
		struct mp resource = mp_next(&one, &in), soft = mp_next(&one, &in), hard = mp_next(&one, &in);
		/* -1 and 2^64-1 both mean unlimited, and are the same bits. */
		if (resource.type != MP_UINT || resource.u > 15 || soft.type > MP_INT || soft.type < MP_UINT || hard.type > MP_INT ||
		    hard.type < MP_UINT)
			return false;
		q->limits[i] = (struct limit){(int)resource.u, {soft.u, hard.u}};
		q->launch.limit_count = i + 1;
	}
	q->launch.limits = q->limits;
	return true;
}

static bool decode_groups(struct request *q, const struct mp *groups)
{
	if (groups->type != MP_ARRAY)
		return groups->type == MP_MISSING || groups->type == MP_NIL;
	if (groups->count > NGROUPS_ROOM)
		return false;
	const uint8_t *at = groups->body;
	q->account.group_count = 0;
	for (uint32_t i = 0; i < groups->count; i++) {
		struct mp g = mp_next(groups, &at);
		if (g.type != MP_UINT || g.u >= UINT32_MAX)
			return false;
		q->account.groups[q->account.group_count++] = (gid_t)g.u;
	}
	return true;
}

static bool arena_make(struct request *q, const struct mp *m, const struct mp *argv)
{
	struct mp env = mp_get(m, "env");
	size_t variables = (env.type == MP_MAP ? env.count : 0) + (configured_env.type == MP_MAP ? configured_env.count : 0) + 8;
	if (variables > ARGUMENTS || argv->count > ARGUMENTS)
		return false;
	/* Every byte of the two maps at most once, a '=' and a NUL for each, and the defaults. */
	size_t bytes = 2 * PAYLOAD_MAX + 2 * (argv->count + variables) + 4 * PATH_ROOM;
	size_t slots = argv->count + variables + 4;
	/* Not from the heap: so much would be mapped and unmapped for each command. */
	static char arena[2 * PAYLOAD_MAX + 2 * (2 * ARGUMENTS) + 4 * PATH_ROOM], *pointers[2 * ARGUMENTS + 4];
	memset(pointers, 0, slots * sizeof *pointers);
	q->pointers = pointers;
	q->at = arena;
	q->end = arena + bytes;
	q->launch.argv = q->pointers + 1; /* launch.c needs the one before */
	q->launch.environment = q->launch.argv + argv->count + 1;
	return true;
}

static bool decode_account(struct request *q, const struct mp *m, struct failure *f)
{
	struct mp user = mp_get(m, "user");
	char spec[2 * NAME_ROOM];
	if (!mp_is_text(&user))
		strcpy(spec, configured_user);
	else if (!mp_copy(&user, spec, sizeof spec))
		return fail(f, "no_such_user", EINVAL, "the user's name is too long");
	const char *code = account_resolve(spec, &q->account);
	if (code)
		return fail(f, code, ENOENT, "%s %s in the guest", code[8] == 'u' ? "no user" : "no group for", spec);
	if (agent.mode != MODE_INIT && geteuid() != 0 && !mp_is_text(&user) && !*configured_user) {
		/* On a host, as an ordinary user: nobody else. */
		char self[16];
		text_format(self, sizeof self, "%u", (unsigned)geteuid());
		account_resolve(self, &q->account);
	}
	struct mp groups = mp_get(m, "groups");
	return decode_groups(q, &groups) || fail(f, "bad_request", EINVAL, "groups: an array of at most %d group ids", NGROUPS_ROOM);
}

static bool decode(struct request *q, const struct mp *m, struct failure *f)
{
	struct mp argv = mp_get(m, "argv"), cwd = mp_get(m, "cwd"), limits = mp_get(m, "rlimits"), mode = mp_get(m, "mode"),
		  tag = mp_get(m, "tag");
	q->tty = mp_bool_or(m, "tty", false);
	q->with_stdin = mp_bool_or(m, "stdin", false);
	q->attach = mp_bool_or(m, "attach", true);
	q->builtin = mp_bool_or(m, "builtin", false);
	q->discard = mp_text_is(&mode, "discard");
	q->rows = (unsigned)mp_u64_or(m, "rows", 24, 65535);
	q->columns = (unsigned)mp_u64_or(m, "cols", 80, 65535);
	q->ring = mp_u64_or(m, "ring", RING_DEFAULT, UINT32_MAX);
	q->args = mp_get(m, "args");
	q->launch.mask = (mode_t)mp_u64_or(m, "umask", 022, 0777);
	if (q->ring < RING_SMALLEST || q->ring > RING_LARGEST || q->ring & (q->ring - 1))
		return fail(f, "bad_request", EINVAL, "ring: a power of two from %d to %d", RING_SMALLEST, RING_LARGEST);
	if (argv.type != MP_ARRAY || !argv.count)
		return fail(f, "bad_request", EINVAL, "argv: an array with at least one entry");
	if (q->builtin && q->tty)
		return fail(f, "bad_request", EINVAL, "an applet has no terminal");
	if (!arena_make(q, m, &argv))
		return fail(f, "too_many", E2BIG, "at most %d arguments and as many variables", ARGUMENTS);
	if (!decode_argv(q, &argv))
		return fail(f, "bad_request", EINVAL, "argv: not text, empty, or with a NUL inside");
	if (!decode_account(q, m, f))
		return false;
	if (!environment_build(q, m))
		return fail(f, "bad_request", EINVAL, "env: names without '=' and NUL, values without NUL");
	if (!decode_limits(q, &limits))
		return fail(f, "bad_request", EINVAL, "rlimits: at most %d of [resource, soft, hard]", LIMITS);
	q->launch.account = &q->account;
	q->launch.tty = q->tty;
	if (*configured_workdir)
		q->launch.workdir = configured_workdir;
	if (mp_is_text(&cwd) && !(q->launch.cwd = decode_directory(q, &cwd)))
		return fail(f, "bad_request", EINVAL, "cwd: too long, or with a NUL inside");
	if (q->launch.cwd && (q->launch.cwd[0] == '/' || !*q->launch.cwd))
		q->launch.workdir = NULL;
	if (q->launch.cwd && !*q->launch.cwd)
		q->launch.cwd = NULL;
	if (!q->launch.cwd && !q->launch.workdir && agent.mode == MODE_INIT)
		q->launch.cwd = "/";
	q->tag = !mp_is_text(&tag) ? "" : tag.count <= TAG_MAX ? keep_text(q, &tag) : NULL;
	return q->tag || fail(f, "bad_request", EINVAL, "tag: at most %d bytes", TAG_MAX);
}

/* ---- descriptors --------------------------------------------------------------------------------------------------------------- */

struct ends {
	int theirs[3]; /* stdin, stdout, stderr of the child */
	int in, out, err;
};

static void close_all(int *fds, int n)
{
	for (int i = 0; i < n; i++) {
		bool shared = false;
		for (int k = 0; k < i; k++)
			shared |= fds[k] == fds[i];
		if (fds[i] >= 0 && !shared)
			close(fds[i]);
	}
}

/* Our end does not block, the child's does: the two have flags of their own. */
static bool one_pipe(int *theirs, int *ours, bool we_read)
{
	int fds[2];
	if (pipe2(fds, O_CLOEXEC))
		return false;
	*ours = fds[we_read ? 0 : 1];
	*theirs = fds[we_read ? 1 : 0];
	return fcntl(*ours, F_SETFL, O_NONBLOCK) == 0;
}

static bool open_pipes(const struct request *q, struct ends *e)
{
	if (q->with_stdin ? !one_pipe(&e->theirs[0], &e->in, false) : (e->theirs[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
		return false;
	return one_pipe(&e->theirs[1], &e->out, true) && one_pipe(&e->theirs[2], &e->err, true);
}

static bool open_terminal(const struct request *q, struct ends *e)
{
	struct winsize size = {.ws_row = (unsigned short)q->rows, .ws_col = (unsigned short)q->columns};
	int unlocked = 0;
	e->out = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (e->out < 0 || ioctl(e->out, TIOCSPTLCK, &unlocked) || (e->in = fcntl(e->out, F_DUPFD_CLOEXEC, 3)) < 0)
		return false;
	int slave = ioctl(e->out, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0)
		return false;
	for (int i = 0; i < 3; i++)
		e->theirs[i] = slave;
	ioctl(slave, TIOCSWINSZ, &size);
	/* The group stays tty, as devpts set it; failing (an ordinary user on a host) is no harm. */
	if (fchown(slave, q->account.uid, (gid_t)-1))
		errno = 0;
	return true;
}

/* ---- starting ------------------------------------------------------------------------------------------------------------------- */

void close_inherited(int keep)
{
	/* Before Linux 5.9 one by one; everything is close-on-exec, which does not help without exec. */
	bool ok = keep <= 3 || syscall(SYS_close_range, 3u, (unsigned)keep - 1, 0u) == 0;
	if (!ok || syscall(SYS_close_range, keep < 3 ? 3u : (unsigned)keep + 1, ~0u, 0u))
		for (int fd = 3; fd < 65536; fd++)
			if (fd != keep)
				close(fd);
}

/* An applet is a child that does not execute anything. It is a copy, not a sharer: it allocates and lives on. */
static pid_t start_applet(struct request *q)
{
	pid_t pid = fork();
	if (pid)
		return pid;
	struct launch *l = &q->launch;
	sigset_t none;
	bool ready = launch_prepare(l);
	/* Only a relative path needs the directory: whoever writes /srv/a must not fail for a missing default directory. */
	bool tolerable = !ready && !strcmp(l->stage, "directory");
	close_inherited(-1);
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (!ready && !tolerable)
		_exit(125);
	_exit(applet_main(l->argv, &q->args, tolerable ? (l->cwd ? l->cwd : l->workdir) : NULL, tolerable ? l->error : 0, &q->account));
}

static bool explain(const struct request *q, struct failure *f)
{
	const struct launch *l = &q->launch;
	const char *name = l->argv[0], *why = strerror(l->error);
	if (!strcmp(l->stage, "directory"))
		return fail(f, "no_such_directory", l->error, "cannot enter %s: %s", l->cwd ? l->cwd : l->workdir, why);
	if (strcmp(l->stage, "exec"))
		return fail(f, "io", l->error, "cannot start %s: %s: %s", name, l->stage, why);
	switch (l->error) {
	case ENOENT:
	case ENOTDIR:
		return fail(f, "no_such_command", l->error, "%s: not found", name);
	case ELIBACC:
		return fail(f, "not_executable", ENOENT, "%s: the interpreter or loader it names is missing", name);
	case ENOEXEC:
		return fail(f, "not_executable", ENOEXEC, "%s: not a program for this machine", name);
	case ENOMEM:
	case EAGAIN:
		return fail(f, "io", l->error, "cannot start %s: %s", name, why);
	default:
		return fail(f, "not_executable", l->error, "%s: %s", name, why);
	}
}

static struct process *start(struct request *q, struct failure *f)
{
	struct ends e = {{-1, -1, -1}, -1, -1, -1};
	int *ours[3] = {&e.in, &e.out, &e.err};
	struct process *p = process_new((uint32_t)q->id);
	pid_t pid = -1;
	if (!p || !(q->tty ? open_terminal(q, &e) : open_pipes(q, &e))) {
		fail(f, "io", p ? errno : ENOMEM, "cannot start %s: %s", q->launch.argv[0], p ? strerror(errno) : "out of memory");
	} else {
		q->launch.in = e.theirs[0];
		q->launch.out = e.theirs[1];
		q->launch.err = e.theirs[2];
		p->started_ns = now_ns();
		pid = q->builtin ? start_applet(q) : launch_start(&q->launch);
		if (pid < 0 && q->builtin)
			fail(f, "io", errno, "cannot start %s: %s", q->launch.argv[0], strerror(errno));
		else if (pid < 0)
			explain(q, f);
	}
	close_all(e.theirs, 3);
	if (pid < 0) {
		for (int i = 0; i < 3; i++)
			if (*ours[i] >= 0)
				close(*ours[i]);
		free(p);
		return NULL;
	}
	p->pty = q->tty;
	p->builtin = q->builtin;
	p->discard = q->discard;
	strcpy(p->tag, q->tag);
	input_init(&p->in, p, e.in);
	output_init(&p->out, p, 4 * p->id + 1, e.out, (uint32_t)q->ring);
	output_init(&p->err, p, 4 * p->id + 2, e.err, (uint32_t)q->ring);
	p->out.attached = p->err.attached = q->attach;
	process_started(p, pid);
	return p;
}

static void reply_started(uint32_t request, const struct process *p)
{
	uint8_t buffer[64];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 2);
	mpw_key_uint(&w, "pid", (uint64_t)p->pid);
	mpw_key_uint(&w, "started", p->started_ns);
	reply(request, &w);
}

void call_exec(uint32_t request, const struct mp *m)
{
	static struct request q;
	struct failure f = {0};
	memset(&q, 0, sizeof q);
	q.id = mp_u64_or(m, "id", 0, UINT32_MAX);
	struct process *p = q.id && q.id < CONNECTION_FIRST ? process_find((uint32_t)q.id) : NULL;
	if (p) {
		reply_started(request, p); /* asked again after a synchronisation */
		return;
	}
	if (!q.id || q.id >= CONNECTION_FIRST)
		fail(&f, "bad_request", EINVAL, "id: from 1 to 2^27-1");
	else if (processes_running >= PROCESSES_RUNNING)
		fail(&f, "too_many", EAGAIN, "%d processes run already", PROCESSES_RUNNING);
	else if (decode(&q, m, &f))
		p = start(&q, &f);
	if (p)
		reply_started(request, p);
	else
		reply_error(request, f.code, f.error, "%s", f.message);
}
