/* `configure`: the one message that makes a booted machine somebody's. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct mp configured_env = {.type = MP_MISSING};
char configured_user[2 * NAME_ROOM], configured_workdir[PATH_ROOM];

bool set_realtime(const struct mp *v)
{
	uint64_t ns;
	if (!mp_u64(v, &ns)) {
		errno = EINVAL;
		return false;
	}
	struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
	return clock_settime(CLOCK_REALTIME, &t) == 0;
}

bool add_entropy(const struct mp *bytes)
{
	struct {
		struct rand_pool_info info;
		uint8_t data[512];
	} pool;
	if (!mp_is_text(bytes) || bytes->count > sizeof pool.data) {
		errno = EINVAL;
		return false;
	}
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	pool.info.entropy_count = (int)bytes->count * 8;
	pool.info.buf_size = (int)bytes->count;
	memcpy(pool.info.buf, bytes->data, bytes->count);
	bool ok = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0;
	/* Two forks of one machine must not go on with the same generator state. */
	ok = ok && (ioctl(fd, RNDRESEEDCRNG) == 0 || errno == EINVAL);
	int error = errno;
	if (fd >= 0)
		close(fd);
	errno = error;
	return ok;
}

/* ---- files in /etc ------------------------------------------------------------------------------------------------------------ */

static bool put(int fd, const char *text)
{
	struct stat st;
	bool ok = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && ftruncate(fd, 0) == 0 &&
		  write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	if (fd >= 0)
		close(fd);
	return ok;
}

/* The image decides what these names are. A link that leads to a file inside the root is followed; one that leads nowhere
 * (systemd-resolved's, before it runs), a FIFO or the like is replaced. On a read-only root the text is mounted over it. */
static bool write_etc(const char *path, const char *text)
{
	enum { FLAGS = O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY };
	if (put(open(path, FLAGS), text))
		return true;
	mkdir("/etc", 0755);
	if (unlink(path) == 0 || errno == ENOENT)
		if (put(open(path, FLAGS | O_CREAT | O_EXCL, 0644), text))
			return true;
	char own[128];
	text_format(own, sizeof own, "/run/stoker/%s", strrchr(path, '/') + 1);
	mkdir("/run/stoker", 0755);
	return put(open(own, FLAGS | O_CREAT, 0644), text) && mount(own, path, NULL, MS_BIND, NULL) == 0;
}

struct text {
	char data[16384];
	size_t length;
	bool bad;
};

static void add(struct text *t, const char *s)
{
	size_t n = strlen(s);
	if (n >= sizeof t->data - t->length) {
		t->bad = true;
		return;
	}
	memcpy(t->data + t->length, s, n + 1);
	t->length += n;
}

/* One word of the host's: no white space, so that it cannot become another line. */
static void add_word(struct text *t, const struct mp *v)
{
	char word[256];
	if (!mp_copy(v, word, sizeof word) || strpbrk(word, " \t\r\n#"))
		t->bad = true;
	else
		add(t, word);
}

static bool write_hosts(const struct mp *hosts, const char *hostname)
{
	static struct text t;
	bool named = false;
	t = (struct text){0};
	add(&t, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
	if (hosts->type == MP_ARRAY) {
		const uint8_t *at = hosts->body;
		for (uint32_t i = 0; i < hosts->count; i++) {
			struct mp line = mp_next(hosts, &at);
			if (line.type != MP_ARRAY || line.count < 2)
				return false;
			const uint8_t *in = line.body;
			for (uint32_t k = 0; k < line.count; k++) {
				struct mp word = mp_next(&line, &in);
				named |= k > 0 && mp_text_is(&word, hostname);
				add_word(&t, &word);
				add(&t, k + 1 < line.count ? "\t" : "\n");
			}
		}
	}
	if (*hostname && !named) {
		add(&t, "127.0.1.1\t");
		add(&t, hostname);
		add(&t, "\n");
	}
	return !t.bad && write_etc("/etc/hosts", t.data);
}

static void add_words(struct text *t, const char *before, const struct mp *list, const char *after)
{
	if (list->type != MP_ARRAY)
		return;
	const uint8_t *at = list->body;
	for (uint32_t i = 0; i < list->count; i++) {
		struct mp word = mp_next(list, &at);
		add(t, before);
		add_word(t, &word);
		add(t, after);
	}
}

static bool write_resolv(const struct mp *resolv)
{
	static struct text t;
	struct mp servers = mp_get(resolv, "nameservers"), search = mp_get(resolv, "search");
	t = (struct text){0};
	add_words(&t, "nameserver ", &servers, "\n");
	if (search.type == MP_ARRAY && search.count) {
		add(&t, "search");
		add_words(&t, " ", &search, "");
		add(&t, "\n");
	}
	return !t.bad && write_etc("/etc/resolv.conf", t.data);
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

/* `read_only`: nothing at all may be written yet, as the disk will be another one. */
static bool mount_root(const struct mp *root, bool read_only, struct failure *f)
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
	if (mount(device, "/newroot", type, mount_flags(&flags) | (read_only ? MS_RDONLY : 0), options))
		return fail(f, "mount_failed", errno, "cannot mount %s as %s: %s", device, type, strerror(errno));
	if (!read_only && mp_bool_or(root, "grow", false))
		mount_grow(device, "/newroot");
	return switch_root(f);
}

/* The root that `prepare` mounted becomes what `configure` wants it to be. */
static bool unlock_root(const struct mp *root, struct failure *f)
{
	char device[256], options[512] = "";
	struct mp d = mp_get(root, "device"), flags = mp_get(root, "flags"), o = mp_get(root, "options");
	if (!mp_copy(&d, device, sizeof device) || (mp_is_text(&o) && !mp_copy(&o, options, sizeof options)))
		return fail(f, "bad_request", EINVAL, "root: device or options");
	if (mount(NULL, "/", NULL, MS_REMOUNT | mount_flags(&flags), options))
		return fail(f, "mount_failed", errno, "cannot make the root file system writable: %s", strerror(errno));
	if (mp_bool_or(root, "grow", false))
		mount_grow(device, "/");
	return true;
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

static bool remember(const struct mp *m, struct failure *f)
{
	struct mp user = mp_get(m, "user"), workdir = mp_get(m, "workdir"), env = mp_get(m, "env");
	if (mp_is_text(&user) && !mp_copy(&user, configured_user, sizeof configured_user))
		return fail(f, "bad_request", EINVAL, "user: too long");
	if (mp_is_text(&workdir) && !mp_copy(&workdir, configured_workdir, sizeof configured_workdir))
		return fail(f, "bad_request", EINVAL, "workdir: too long");
	if (*configured_workdir && *configured_workdir != '/')
		return fail(f, "bad_request", EINVAL, "workdir: not an absolute path");
	if (env.type != MP_MAP)
		return true;
	/* The map is kept as it came; the parser checked it as a whole. */
	const uint8_t *at = env.body;
	for (uint32_t i = 0; i < 2 * env.count; i++)
		mp_next(&env, &at);
	size_t n = (size_t)(at - env.body);
	uint8_t *copy = malloc(n + 1);
	if (!copy)
		return fail(f, "io", ENOMEM, "out of memory");
	memcpy(copy, env.body, n);
	configured_env = env;
	configured_env.body = copy;
	configured_env.end = copy + n;
	return true;
}

static bool identity(const struct mp *m, struct failure *f)
{
	char hostname[NAME_ROOM] = "";
	struct mp h = mp_get(m, "hostname"), hosts = mp_get(m, "hosts"), resolv = mp_get(m, "resolv");
	if (mp_is_text(&h) && (!mp_copy(&h, hostname, sizeof hostname) || strpbrk(hostname, " \t\r\n")))
		return fail(f, "bad_request", EINVAL, "hostname: at most %d characters", NAME_ROOM - 1);
	if (*hostname) {
		char line[NAME_ROOM + 1];
		text_format(line, sizeof line, "%s\n", hostname);
		if (sethostname(hostname, strlen(hostname)))
			return fail(f, "io", errno, "cannot set the host name: %s", strerror(errno));
		if (!write_etc("/etc/hostname", line))
			logf_host("warning", "cannot write /etc/hostname: %s", strerror(errno));
	}
	if (!write_hosts(&hosts, hostname))
		return fail(f, "io", errno, "cannot write /etc/hosts: %s", strerror(errno));
	if (resolv.type == MP_MAP && !write_resolv(&resolv))
		return fail(f, "io", errno, "cannot write /etc/resolv.conf: %s", strerror(errno));
	return true;
}

/* Two copies of one machine are not in the same boot. */
static bool new_boot_id(void)
{
	static const char source[] = "/proc/sys/kernel/random/uuid", own[] = "/run/stoker/boot_id", place[] = "/proc/sys/kernel/random/boot_id";
	char uuid[64];
	int fd;
	mkdir("/run/stoker", 0755);
	if (!read_small(source, uuid, sizeof uuid) || (fd = open(own, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0444)) < 0)
		return false;
	return put(fd, uuid) && mount(own, place, NULL, MS_BIND, NULL) == 0 && mount(NULL, place, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) == 0;
}

/* The part that is the same for every machine of one root file system, and may so be done before its memory is put away. */
static bool prepare_machine(const struct mp *m, bool network, bool read_only, struct failure *f)
{
	struct mp root = mp_get(m, "root");
	if (network)
		modules_load_network();
	if (root.type == MP_MAP && !mount_root(&root, read_only, f))
		return false;
	mount_rest(mp_bool_or(m, "tmpfs_tmp", false));
	network_loopback();
	agent.prepared = true;
	return true;
}

static bool configure_machine(const struct mp *m, struct failure *f)
{
	struct mp root = mp_get(m, "root"), network = mp_get(m, "network"), entropy = mp_get(m, "entropy"), realtime = mp_get(m, "realtime"),
		  modules = mp_get(m, "modules"), mounts = mp_get(m, "mounts");
	bool copy = agent.prepared;
	/* Before anything that might want random numbers or look at the clock. */
	if (mp_is_text(&entropy) && !add_entropy(&entropy))
		return fail(f, "io", errno, "cannot add entropy: %s", strerror(errno));
	if (realtime.type == MP_UINT && !set_realtime(&realtime))
		return fail(f, "io", errno, "cannot set the clock: %s", strerror(errno));
	if (copy && !new_boot_id())
		return fail(f, "io", errno, "cannot give this copy a boot id of its own: %s", strerror(errno));
	if (!load_named(&modules, f))
		return false;
	if (!copy ? !prepare_machine(m, network.type == MP_MAP, false, f) : root.type == MP_MAP && !unlock_root(&root, f))
		return false;
	if (!mount_all(&mounts, f))
		return false;
	return identity(m, f) && (network.type != MP_MAP || network_configure(&network, f));
}

void call_prepare(uint32_t request, const struct mp *m)
{
	struct failure f = {0};
	if (agent.mode != MODE_INIT)
		reply_error(request, "unsupported", ENOSYS, "only a machine of its own can be prepared");
	else if (agent.prepared || agent.configured)
		reply_error(request, "already_configured", EALREADY, "this machine is prepared");
	else if (!prepare_machine(m, mp_bool_or(m, "network", false), true, &f))
		reply_error(request, f.code, f.error, "%s", f.message);
	else
		reply_empty(request);
}

void call_configure(uint32_t request, const struct mp *m)
{
	struct failure f = {0};
	uint8_t buffer[16];
	struct mp_writer w;
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
	if (!remember(m, &f) || (agent.mode == MODE_INIT && (!configure_machine(m, &f) || (beside && !hand_over(&f))))) {
		reply_error(request, f.code, f.error, "%s", f.message);
		return;
	}
	agent.configured = true;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 1);
	mpw_key_bool(&w, "pid1", agent.mode == MODE_INIT && !agent.beside);
	reply(request, &w);
}
