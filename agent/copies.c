/* Two machines from one memory must not be twins: what is done before a snapshot, in the machine that goes on, and in each copy.
 * What the guest cannot do for itself is told to the host, hazard by hazard. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { FROZEN_MS = 10000, HOOK_MS = 10000, HOOK_MS_MAX = 600000 };

static const char HOOKS[] = "/etc/stoker/hooks.d";

static enum { IDLE, BEFORE_HOOKS, BEFORE_QUIET, AFTER_HOOKS } stage;
static uint32_t request;
static uint64_t asked_by; /* the connection's generation */
static bool want_freeze, want_drop;
static uint64_t frozen_until;
static bool thawed_early;
static bool done; /* the report is that of a restore: of this generation, and with entropy of this check sum */
static uint64_t done_generation;
static uint32_t done_entropy;

/* ---- the report ------------------------------------------------------------------------------------------------------------------- */

static uint8_t buffer[PAYLOAD_MAX];
static struct {
	struct mp_writer w;
	size_t mark;
	uint32_t hazards;
	struct laps laps;
} report;

static void report_begin(void)
{
	mpw_init(&report.w, buffer, sizeof buffer);
	mpw_map(&report.w, 2);
	mpw_str(&report.w, "hazards");
	report.mark = mpw_open_array(&report.w);
	report.hazards = 0;
	laps_begin(&report.laps);
	done = false;
}

static void hazard(const char *before, const char *name, bool handled, bool beyond, const char *format, va_list args)
{
	char text[768], whole[160];
	text_format(whole, sizeof whole, "%s%s", before, name);
	text_formatv(text, sizeof text, format, args);
	mpw_map(&report.w, 5);
	mpw_str(&report.w, "name");
	mpw_clean(&report.w, whole);
	mpw_key_bool(&report.w, "handled", handled);
	mpw_str(&report.w, "detail");
	mpw_clean(&report.w, text);
	mpw_key_uint(&report.w, "at", realtime_ns());
	mpw_key_bool(&report.w, "beyond", beyond);
	report.hazards++;
}

void report_hazard(const char *name, bool handled, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	hazard("", name, handled, false, format, args);
	va_end(args);
}

void report_hazard_named(const char *before, const char *name, bool handled, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	hazard(before, name, handled, false, format, args);
	va_end(args);
}

static void report_beyond(const char *name, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	hazard("", name, false, true, format, args);
	va_end(args);
}

static void step(const char *name)
{
	lap(&report.laps, name);
}

static void report_close(void)
{
	mpw_close(&report.w, report.mark, report.hazards);
	laps_write(&report.w, &report.laps);
}

static void finish(void)
{
	report_close();
	stage = IDLE;
	channel_hold(false);
	if (asked_by == channel_generation)
		reply(request, &report.w);
}

static uint64_t hook_limit(const struct mp *m)
{
	return mp_u64_or(m, "hook_ms", HOOK_MS, HOOK_MS_MAX);
}

static const char *hook_directory(void)
{
	/* A test on a host has none of its own. */
	return agent.mode == MODE_INIT ? HOOKS : getenv("STOKER_HOOKS");
}

static bool begin_hooks(const char *kind, const struct mp *m)
{
	const char *directory = hook_directory();
	return mp_bool_or(m, "hooks", true) && directory && hooks_begin(directory, kind, hook_limit(m));
}

/* ---- before a snapshot -------------------------------------------------------------------------------------------------------------- */

static void on_quiet(struct watch *w, uint32_t events);
static struct watch quiet = {.ready = on_quiet, .fd = -1};

/* In a child: all of it may take long. */
static void begin_quiet(void)
{
	int pipes[2];
	stage = BEFORE_QUIET;
	if (pipe2(pipes, O_CLOEXEC)) {
		report_hazard("file_systems", false, "no pipe: %s", strerror(errno));
		finish();
		return;
	}
	pid_t pid = fork();
	if (pid == 0)
		quiet_child(want_freeze, want_drop, pipes[1]);
	int error = errno;
	close(pipes[1]);
	if (pid < 0) {
		close(pipes[0]);
		report_hazard("file_systems", false, "cannot start a process: %s", strerror(error));
		finish();
		return;
	}
	quiet.fd = pipes[0];
	fcntl(quiet.fd, F_SETFL, O_NONBLOCK);
	watch_add(&quiet, EPOLLIN | EPOLLRDHUP);
	frozen_until = want_freeze ? UINT64_MAX : 0;
}

static void report_quiet(const struct quiet_result *r)
{
	if (want_freeze) {
		report_hazard("file_systems", !r->freeze_error, "%u frozen%s%s%s%s", r->frozen, r->freeze_error ? ", not " : "", r->freeze_error ? r->where : "",
			      r->freeze_error ? ": " : "", r->freeze_error ? strerror(r->freeze_error) : "");
		frozen_until = now_ns() + FROZEN_MS * 1000000ull;
	} else {
		report_hazard("file_systems", true, "written out");
	}
	if (want_drop && r->drop_error)
		report_hazard("free_memory", false, "caches stay: %s", strerror(r->drop_error));
	else if (want_drop)
		report_hazard("free_memory", true, "%lu MiB of zeros, %lu MiB left out", (unsigned long)(r->zeroed >> 20), (unsigned long)(r->left >> 20));
}

static void on_quiet(struct watch *w, uint32_t events)
{
	(void)events;
	struct quiet_result r;
	ssize_t n = read(w->fd, &r, sizeof r);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	watch_close(w);
	thawed_early = false;
	if (n == sizeof r)
		report_quiet(&r);
	else
		report_hazard("file_systems", false, "what writes them out was killed");
	step("quiet");
	finish();
}

void call_before_snapshot(uint32_t r, const struct mp *m)
{
	if (stage != IDLE) {
		reply_error(r, "too_many", EBUSY, "a snapshot is being prepared already");
		return;
	}
	request = r;
	asked_by = channel_generation;
	want_freeze = mp_bool_or(m, "freeze", false);
	want_drop = mp_bool_or(m, "drop_caches", false);
	report_begin();
	stage = BEFORE_HOOKS;
	if (!begin_hooks("pre-snapshot", m))
		begin_quiet();
}

static unsigned thaw(void)
{
	unsigned thawed = frozen_until ? quiet_thaw() : 0;
	frozen_until = 0;
	return thawed;
}

void call_after_snapshot(uint32_t r)
{
	if (stage != IDLE) {
		reply_error(r, "too_many", EBUSY, "a snapshot is being prepared still");
		return;
	}
	request = r;
	asked_by = channel_generation;
	report_begin();
	bool was = frozen_until || thawed_early;
	unsigned n = thaw();
	if (was)
		report_hazard("file_systems", !thawed_early, thawed_early ? "thawed after %u s, before the host said so" : "%u thawed",
			      thawed_early ? FROZEN_MS / 1000 : n);
	thawed_early = false;
	step("thaw");
	finish();
}

/* ---- after a restore ------------------------------------------------------------------------------------------------------------------- */

static void restore_entropy(const struct mp *m)
{
	struct mp entropy = mp_get(m, "entropy");
	errno = EINVAL;
	if (mp_is_text(&entropy) && entropy.count >= 32 && add_entropy(&entropy))
		report_hazard("random", true, "%u bytes mixed in and credited, generator seeded anew", entropy.count);
	else
		report_hazard("random", false, "%s", strerror(errno));
}

static void restore_clock(const struct mp *m)
{
	struct mp realtime = mp_get(m, "realtime");
	uint64_t before = realtime_ns();
	if (realtime.type != MP_UINT)
		return;
	bool ok = set_realtime(&realtime);
	int64_t ms = ((int64_t)realtime.u - (int64_t)before) / 1000000;
	if (ok)
		report_hazard("clock", true, "stepped by %ld ms", (long)ms);
	else
		report_hazard("clock", false, "%s", strerror(errno));
}

static void restore_names(const struct mp *m, bool copy)
{
	struct failure f;
	struct mp name = mp_get(m, "hostname");
	char boot_id[64] = "";
	struct mp id = mp_get(m, "boot_id");
	bool given = mp_is_text(&id) && id.count;
	if (copy || given) {
		bool ok = (!given || mp_copy(&id, boot_id, sizeof boot_id)) && boot_id_set(given ? boot_id : NULL);
		report_hazard("boot_id", ok, "%s", ok ? "another one" : strerror(errno));
	}
	if (!names_set(m, true, &f))
		report_hazard("hostname", false, "%s", f.message);
	else if (mp_is_text(&name) || copy)
		report_hazard("hostname", true, "%s", mp_is_text(&name) ? "set" : "kept, as the host wants it");
}

static void restore_machine_id(const struct mp *m, bool copy)
{
	struct mp v = mp_get(m, "machine_id");
	char id[NAME_ROOM];
	if (copy && !machine_id_known()) {
		report_hazard("machine_id", true, "there is none");
	} else if (mp_is_text(&v)) {
		bool ok = mp_copy(&v, id, sizeof id) && machine_id_set(id);
		report_hazard("machine_id", ok, "%s", ok ? "set" : strerror(errno));
	} else if (copy) {
		report_hazard("machine_id", false, "still that of the machine it was copied from");
	}
}

/* True: an sshd has to read its keys again. */
static bool restore_keys(const struct mp *m, bool copy)
{
	struct mp keys = mp_get(m, "ssh_host_keys");
	struct failure f;
	bool given = keys.type == MP_ARRAY && keys.count;
	if (!given && !copy)
		return false;
	if (!sshd_installed()) {
		report_hazard("ssh_host_keys", true, "no sshd is installed");
		return false;
	}
	if (!given) {
		unsigned old = host_keys(&keys, false);
		report_hazard("ssh_host_keys", !old, "%u files are those of the machine it was copied from", old);
		return false;
	}
	if (!host_keys_write(&keys, &f)) {
		report_hazard("ssh_host_keys", false, "%s", f.message);
		return false;
	}
	report_hazard("ssh_host_keys", true, "%u files written, %u of other types removed", keys.count, host_keys(&keys, true));
	return true;
}

static void restore_others(const struct mp *m, bool copy, bool sshd)
{
	static struct others o;
	bool drop = mp_bool_or(m, "drop_connections", true);
	if (!copy && !drop && !sshd)
		return; /* nobody asks */
	others_visit(drop, sshd, &o);
	if (sshd)
		report_hazard("sshd", true, o.reloaded ? "told to read its keys" : "none is running");
	if (drop)
		report_hazard("connections", !o.error, "%u ended%s%s", o.dropped, o.error ? ", not all: " : "", o.error ? strerror(o.error) : "");
	if (!copy)
		return;
	connections_sweep(true); /* their other ends are the original's */
	if (o.count)
		report_beyond("processes", "%u go on with what they hold in memory (random state, keys, ids): %s", o.count, o.names);
	else
		report_hazard("processes", true, "none was running");
	report_beyond("kernel_secrets", "what the kernel chose at its boot (addresses, hash keys) is the same in every copy");
}

static void restore_network(const struct mp *m)
{
	struct mp network = mp_get(m, "network");
	struct failure f;
	if (network.type != MP_MAP)
		report_hazard("network", true, "kept, as the host wants it");
	else if (network_change(&network, &f))
		report_hazard("network", true, "set");
	else
		report_hazard("network", false, "%s", f.message);
}

static void restore(const struct mp *m)
{
	bool copy = mp_bool_or(m, "copy", true);
	struct failure f;
	restore_entropy(m);
	restore_clock(m);
	step("random_clock");
	unsigned thawed = thaw();
	thawed_early = false;
	if (thawed)
		report_hazard("file_systems", true, "%u thawed", thawed);
	step("thaw");
	restore_names(m, copy);
	restore_machine_id(m, copy);
	step("names");
	bool sshd = restore_keys(m, copy);
	step("keys");
	restore_others(m, copy, sshd);
	step("processes");
	restore_network(m);
	step("network");
	if (!generation_write(mp_u64_or(m, "generation", 0, UINT64_MAX)))
		report_hazard("generation", false, "%s", strerror(errno));
	if (!defaults_keep(m, &f))
		report_hazard("defaults", false, "%s", f.message);
	step("generation");
}

static uint32_t check_of(const struct mp *m)
{
	struct mp entropy = mp_get(m, "entropy");
	return mp_is_text(&entropy) ? crc32_of(entropy.data, entropy.count) : 0;
}

void call_after_restore(uint32_t r, const struct mp *m)
{
	uint64_t generation = mp_u64_or(m, "generation", 0, UINT64_MAX);
	uint32_t check = check_of(m);
	if (agent.mode == MODE_INIT && !agent.configured) {
		reply_error(r, "not_ready", EINVAL, "this machine was told nothing yet: configure it");
		return;
	}
	request = r;
	asked_by = channel_generation;
	if (stage == IDLE && done && done_entropy == check && done_generation == generation) {
		/* The answer was lost with its connection. Nothing is done twice. */
		reply(r, &report.w);
		return;
	}
	if (agent.mode == MODE_INIT && host_keys_wanted(m)) {
		/* Nothing is done until it comes again with them, but that nobody here draws the original's random numbers meanwhile. */
		struct mp entropy = mp_get(m, "entropy");
		add_entropy(&entropy);
		mpw_init(&report.w, buffer, sizeof buffer);
		mpw_map(&report.w, 1);
		host_keys_list(&report.w);
		done = false;
		reply(r, &report.w);
		return;
	}
	/* A snapshot that the host did not wait for: it is the original's, not ours. */
	hooks_abandon();
	if (quiet.fd >= 0)
		watch_close(&quiet);
	report_begin();
	if (agent.mode == MODE_INIT)
		restore(m);
	done = true;
	done_generation = generation;
	done_entropy = check;
	stage = AFTER_HOOKS;
	channel_hold(true);
	if (!begin_hooks("post-restore", m))
		finish();
}

bool copies_work(void)
{
	if (frozen_until && stage == IDLE) {
		if (now_ns() < frozen_until) {
			wake_at(frozen_until);
		} else {
			thaw();
			thawed_early = true;
		}
	}
	if ((stage != BEFORE_HOOKS && stage != AFTER_HOOKS) || hooks_work())
		return false;
	step("hooks");
	if (stage == BEFORE_HOOKS)
		begin_quiet();
	else
		finish();
	return true;
}
