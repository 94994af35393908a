/* `configure`: the one message that makes a booted machine somebody's. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

struct mp configured_env = {.type = MP_MISSING};
char configured_user[2 * NAME_ROOM], configured_workdir[PATH_ROOM];

/* What `prepare` did already, as it was asked for: the same words again in `configure` ask for nothing. */
struct told {
	uint8_t bytes[1024];
	size_t length;
};

static struct told told_root, told_network;

static void remember_told(struct told *t, const struct mp *v)
{
	size_t n = v->type == MP_MAP ? mp_size(v) : 0;
	t->length = n <= sizeof t->bytes ? n : 0;
	if (t->length)
		memcpy(t->bytes, v->body, t->length);
}

static bool was_told(const struct told *t, const struct mp *v)
{
	return v->type == MP_MAP && t->length && t->length == mp_size(v) && !memcmp(t->bytes, v->body, t->length);
}

/* ---- the root ----------------------------------------------------------------------------------------------------------------- */

/* What switch_root does, but PID 1 stays: the new root moves over /, and the initramfs, now out of sight, is emptied. */
static bool switch_root(struct failure *f)
{
	static const char *const moved[] = {"/dev", "/proc", "/sys"};
	char target[32];
	int old = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	for (int i = 0; i < 3; i++) {
		text_format(target, sizeof target, "/newroot%s", moved[i]);
		mkdir(target, 0755);
		if (mount(moved[i], target, NULL, MS_MOVE, NULL))
			return fail(f, "mount_failed", errno, "the root file system has no usable %s: %s", moved[i], strerror(errno));
	}
	if (chdir("/newroot") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		return fail(f, "mount_failed", errno, "cannot switch to the root file system: %s", strerror(errno));
	root_empty(old);
	return true;
}

static bool mount_root(const struct mp *root, struct failure *f)
{
	char device[256], type[32] = "ext4", options[512] = "";
	struct mp d = mp_get(root, "device"), t = mp_get(root, "fstype"), flags = mp_get(root, "flags"), o = mp_get(root, "options");
	if (!mp_copy(&d, device, sizeof device) || (mp_is_text(&t) && !mp_copy(&t, type, sizeof type)) ||
	    (mp_is_text(&o) && !mp_copy(&o, options, sizeof options)))
		return fail(f, "bad_request", EINVAL, "root: device, fstype or options");
	if (device[0] == '/' && !mount_wait(device))
		return fail(f, "mount_failed", ENODEV, "no device %s", device);
	mkdir("/newroot", 0755);
	/* The image's own devices and set-uid programs work: the machine is the boundary. */
	if (!mount_disk(device, "/newroot", type, &flags, options))
		return fail(f, "mount_failed", errno, "cannot mount %s as %s: %s", device, type, strerror(errno));
	if (mp_bool_or(root, "grow", false))
		mount_grow(device, "/newroot");
	return switch_root(f);
}

/* ---- the call ------------------------------------------------------------------------------------------------------------------ */

static bool load_named(const struct mp *names, struct failure *f)
{
	if (names->type != MP_ARRAY)
		return true;
	const uint8_t *at = names->body;
	for (uint32_t i = 0; i < names->count; i++) {
		struct mp name = mp_next(names, &at);
		char file[NAME_ROOM];
		int error = 0;
		if (!mp_copy(&name, file, sizeof file) || strchr(file, '/'))
			return fail(f, "bad_request", EINVAL, "modules: names of files in /modules");
		if (!modules_load_later(file, &error))
			return fail(f, "io", error, "cannot load the module %s: %s", file, strerror(error));
	}
	return true;
}

/* The map is kept as it came; the parser checked it as a whole. */
static void environment_keep(const struct mp *env)
{
	static uint8_t kept[PAYLOAD_MAX];
	size_t n = mp_size(env);
	memmove(kept, env->body, n); /* which is less than a payload */
	configured_env = *env;
	configured_env.body = kept;
	configured_env.end = kept + n;
}

bool defaults_keep(const struct mp *m, struct failure *f)
{
	struct mp user = mp_get(m, "user"), workdir = mp_get(m, "workdir"), env = mp_get(m, "env");
	if (mp_is_text(&user) && !mp_copy(&user, configured_user, sizeof configured_user))
		return fail(f, "bad_request", EINVAL, "user: too long");
	if (mp_is_text(&workdir) && !mp_copy(&workdir, configured_workdir, sizeof configured_workdir))
		return fail(f, "bad_request", EINVAL, "workdir: too long");
	if (*configured_workdir && *configured_workdir != '/')
		return fail(f, "bad_request", EINVAL, "workdir: not an absolute path");
	if (env.type == MP_MAP)
		environment_keep(&env);
	return true;
}

/* The part that is the same for every machine of one root file system, and may so be done before its memory is put away. */
static bool prepare_machine(const struct mp *m, bool network, bool own_files, struct failure *f)
{
	struct mp root = mp_get(m, "root");
	if (network)
		modules_load_network();
	if (root.type == MP_MAP && !mount_root(&root, f))
		return false;
	mount_rest(mp_bool_or(m, "tmpfs_tmp", false));
	if (own_files && root.type == MP_MAP) {
		names_prepare();
		/* Each copy asks, and then it is known. */
		sshd_installed();
		machine_id_known();
		euidaccess("/etc/stoker", F_OK);
	}
	others_prepare();
	network_loopback();
	agent.prepared = true;
	return true;
}

static bool configure_further(const struct mp *interfaces, struct failure *f)
{
	const uint8_t *at = interfaces->body;
	for (uint32_t i = 0; interfaces->type == MP_ARRAY && i < interfaces->count; i++) {
		struct mp one = mp_next(interfaces, &at);
		if (one.type != MP_MAP)
			return fail(f, "bad_request", EINVAL, "interfaces: not a map");
		if (!network_configure(&one, f))
			return false;
	}
	return true;
}

/* ``wanted``: it stays prepared, until the same comes again with the host keys that its disk is to have. */
static bool configure_machine(const struct mp *m, struct laps *l, bool *wanted, struct failure *f)
{
	struct mp root = mp_get(m, "root"), network = mp_get(m, "network"), entropy = mp_get(m, "entropy"), realtime = mp_get(m, "realtime"),
		  modules = mp_get(m, "modules"), mounts = mp_get(m, "mounts"), further = mp_get(m, "interfaces");
	struct mp init = mp_get(m, "init"), id = mp_get(m, "boot_id");
	char boot_id[64];
	bool copy = agent.prepared, beside = mp_text_is(&init, "image");
	/* Before anything that might want random numbers or look at the clock. */
	if (mp_is_text(&entropy) && !add_entropy(&entropy))
		return fail(f, "io", errno, "cannot add entropy: %s", strerror(errno));
	if (realtime.type == MP_UINT && !set_realtime(&realtime))
		return fail(f, "io", errno, "cannot set the clock: %s", strerror(errno));
	lap(l, "random_clock");
	if (copy && !boot_id_set(mp_is_text(&id) && mp_copy(&id, boot_id, sizeof boot_id) ? boot_id : NULL))
		return fail(f, "io", errno, "cannot give this copy a boot id of its own: %s", strerror(errno));
	if (!load_named(&modules, f))
		return false;
	lap(l, "boot_id");
	bool networked = network.type == MP_MAP || (further.type == MP_ARRAY && further.count);
	if (!copy && !prepare_machine(m, networked, !beside, f))
		return false;
	if (copy && root.type == MP_MAP && !was_told(&told_root, &root))
		return fail(f, "bad_request", EINVAL, "root: this machine was prepared with another one");
	lap(l, "root");
	*wanted = host_keys_wanted(m);
	if (*wanted) {
		remember_told(&told_root, &root);
		return true;
	}
	if (!mount_all(&mounts, f))
		return false;
	lap(l, "mounts");
	if (!names_set(m, false, f) || !machine_id_and_keys(m, f))
		return false;
	lap(l, "names");
	bool ok = network.type != MP_MAP || was_told(&told_network, &network) ||
		  (told_network.length ? network_change(&network, f) : network_configure(&network, f));
	ok = ok && configure_further(&further, f);
	lap(l, "network");
	return ok;
}

void call_prepare(uint32_t request, const struct mp *m)
{
	struct failure f = {0};
	struct mp network = mp_get(m, "network"), root = mp_get(m, "root");
	bool with = network.type == MP_MAP || mp_bool_or(m, "network", false);
	if (agent.mode != MODE_INIT) {
		reply_error(request, "unsupported", ENOSYS, "only a machine of its own can be prepared");
		return;
	}
	if (agent.prepared || agent.configured) {
		reply_error(request, "already_configured", EALREADY, "this machine is prepared");
		return;
	}
	if (!prepare_machine(m, with, true, &f) || (network.type == MP_MAP && !network_configure(&network, &f))) {
		reply_error(request, f.code, f.error, "%s", f.message);
		return;
	}
	remember_told(&told_root, &root);
	remember_told(&told_network, &network);
	boot_id_prepare();
	reply_empty(request);
}

void call_configure(uint32_t request, const struct mp *m)
{
	struct failure f = {0};
	struct laps laps;
	uint8_t buffer[4096];
	struct mp_writer w;
	laps_begin(&laps);
	if (agent.configured) {
		reply_error(request, "already_configured", EALREADY, "this machine is configured");
		return;
	}
	struct mp init = mp_get(m, "init");
	bool beside = mp_text_is(&init, "image");
	if (mp_is_text(&init) && !beside && !mp_text_is(&init, "agent")) {
		reply_error(request, "bad_request", EINVAL, "init is agent or image");
		return;
	}
	bool wanted = false, init_mode = agent.mode == MODE_INIT;
	if (!defaults_keep(m, &f) || (init_mode && (!configure_machine(m, &laps, &wanted, &f) || (!wanted && beside && !hand_over(&f))))) {
		reply_error(request, f.code, f.error, "%s", f.message);
		return;
	}
	mpw_init(&w, buffer, sizeof buffer);
	if (wanted) {
		mpw_map(&w, 1);
		host_keys_list(&w);
		reply(request, &w);
		return;
	}
	agent.configured = true;
	mpw_map(&w, 2);
	laps_write(&w, &laps);
	mpw_key_bool(&w, "pid1", agent.mode == MODE_INIT && !agent.beside);
	reply(request, &w);
}
