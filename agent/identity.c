/* What makes a machine this one: entropy, clock, names, ids and keys. Told by `configure`, and again by `after_restore`. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MACHINE_ID = 32, UUID = 36, KEYS_MAX = 32, KEY_SIZE = 32 << 10 };

static const char SSH_KEYS[] = "/etc/ssh", BOOT_ID[] = "/proc/sys/kernel/random/boot_id", OWN_BOOT_ID[] = "/run/stoker/boot_id";

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

uint64_t realtime_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec < 0 ? 0 : (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
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

/* ---- files ---------------------------------------------------------------------------------------------------------------------- */

/* Shortened at the end, never to nothing: ext4 writes a file that was once empty out at once when it is closed. */
static bool put(int fd, const char *text)
{
	struct stat st;
	size_t n = strlen(text);
	bool ok = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && pwrite(fd, text, n, 0) == (ssize_t)n &&
		  (st.st_size <= (off_t)n || ftruncate(fd, (off_t)n) == 0);
	if (fd >= 0)
		close(fd);
	return ok;
}

/* Whoever reads the file sees the old one or the new one. */
static bool replace_file(const char *path, const void *data, size_t n, mode_t mode)
{
	char beside[PATH_ROOM];
	text_format(beside, sizeof beside, "%.4000s.stoker-new", path);
	unlink(beside);
	int fd = open(beside, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	bool ok = fd >= 0 && write(fd, data, n) == (ssize_t)n && fchmod(fd, mode) == 0 && rename(beside, path) == 0;
	int error = errno;
	if (fd >= 0)
		close(fd);
	if (!ok)
		unlink(beside);
	errno = error;
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

static struct text text;

static void add_piece(struct text *t, const char *s, size_t n)
{
	if (n >= sizeof t->data - t->length) {
		t->bad = true;
		return;
	}
	memcpy(t->data + t->length, s, n);
	t->length += n;
	t->data[t->length] = 0;
}

static void add(struct text *t, const char *s)
{
	add_piece(t, s, strlen(s));
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

static void add_name(struct text *t, const char *hostname)
{
	add(t, "127.0.1.1\t");
	add(t, hostname);
	add(t, "\n");
}

static bool write_hosts(const struct mp *hosts, const char *hostname)
{
	struct text *t = &text;
	bool named = false;
	*t = (struct text){0};
	add(t, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
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
				add_word(t, &word);
				add(t, k + 1 < line.count ? "\t" : "\n");
			}
		}
	}
	if (*hostname && !named)
		add_name(t, hostname);
	return !t->bad && write_etc("/etc/hosts", t->data);
}

/* A copy's /etc/hosts is its user's: nothing but the old name in it becomes the new one. */
static bool rename_in_hosts(const char *old, const char *new)
{
	static char before[sizeof text.data];
	struct text *t = &text;
	bool named = false;
	*t = (struct text){0};
	if (read_small("/etc/hosts", before, sizeof before) == sizeof before - 1) {
		errno = EFBIG;
		return false;
	}
	for (const char *at = before; *at;) {
		size_t gap = strspn(at, " \t\r\n"), word;
		add_piece(t, at, gap);
		at += gap;
		word = *at == '#' ? strcspn(at, "\n") : strcspn(at, " \t\r\n#");
		bool is_old = word == strlen(old) && !memcmp(at, old, word);
		named |= is_old || (word == strlen(new) && !memcmp(at, new, word));
		add_piece(t, is_old ? new : at, is_old ? strlen(new) : word);
		at += word;
	}
	if (!named)
		add_name(t, new);
	return !t->bad && (!strcmp(before, t->data) || write_etc("/etc/hosts", t->data));
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
	struct text *t = &text;
	struct mp servers = mp_get(resolv, "nameservers"), search = mp_get(resolv, "search");
	*t = (struct text){0};
	add_words(t, "nameserver ", &servers, "\n");
	if (search.type == MP_ARRAY && search.count) {
		add(t, "search");
		add_words(t, " ", &search, "");
		add(t, "\n");
	}
	return !t->bad && write_etc("/etc/resolv.conf", t->data);
}

/* ---- names ---------------------------------------------------------------------------------------------------------------------- */

bool names_set(const struct mp *m, bool copy, struct failure *f)
{
	char hostname[NAME_ROOM] = "", old[NAME_ROOM + 1] = "";
	struct mp h = mp_get(m, "hostname"), hosts = mp_get(m, "hosts"), resolv = mp_get(m, "resolv");
	if (mp_is_text(&h) && (!mp_copy(&h, hostname, sizeof hostname) || strpbrk(hostname, " \t\r\n")))
		return fail(f, "bad_request", EINVAL, "hostname: at most %d characters", NAME_ROOM - 1);
	gethostname(old, sizeof old - 1);
	if (*hostname) {
		char line[NAME_ROOM + 1];
		text_format(line, sizeof line, "%s\n", hostname);
		if (sethostname(hostname, strlen(hostname)))
			return fail(f, "io", errno, "cannot set the host name: %s", strerror(errno));
		if (!write_etc("/etc/hostname", line))
			logf_host("warning", "cannot write /etc/hostname: %s", strerror(errno));
	}
	bool whole = !copy || hosts.type == MP_ARRAY;
	if (whole ? !write_hosts(&hosts, *hostname ? hostname : old) : *hostname && !rename_in_hosts(old, hostname))
		return fail(f, "io", errno, "cannot write /etc/hosts: %s", strerror(errno));
	if (resolv.type == MP_MAP && !write_resolv(&resolv))
		return fail(f, "io", errno, "cannot write /etc/resolv.conf: %s", strerror(errno));
	return true;
}

void names_prepare(void)
{
	static const char *const names[] = {"hostname", "hosts", "resolv.conf"};
	for (int i = 0; i < 3; i++) {
		char path[64], own[64];
		struct stat st;
		text_format(path, sizeof path, "/etc/%s", names[i]);
		text_format(own, sizeof own, "/run/stoker/%s", names[i]);
		int made = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
		if (made >= 0)
			close(made);
		/* A link is the image's own arrangement. */
		if (lstat(path, &st) || !S_ISREG(st.st_mode))
			continue;
		read_small(path, text.data, sizeof text.data);
		if (put(open(own, O_WRONLY | O_CREAT | O_CLOEXEC, 0644), text.data))
			mount(own, path, NULL, MS_BIND, NULL);
	}
}

/* Two copies of one machine are not in the same boot. The kernel's own id cannot be changed: another is mounted over it. */
static char known_boot_id[UUID + 2];

const char *boot_id(void)
{
	if (!*known_boot_id)
		read_small(BOOT_ID, known_boot_id, sizeof known_boot_id);
	known_boot_id[strcspn(known_boot_id, "\n")] = 0;
	return known_boot_id;
}

static bool boot_id_over(void)
{
	static bool over; /* and so it is in a copy of this machine */
	over = over || (mount(OWN_BOOT_ID, BOOT_ID, NULL, MS_BIND, NULL) == 0 && mount(NULL, BOOT_ID, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) == 0);
	return over;
}

static int open_boot_id(void)
{
	int fd = open(OWN_BOOT_ID, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0444);
	if (fd >= 0 || errno != ENOENT)
		return fd;
	mkdir("/run/stoker", 0755);
	return open(OWN_BOOT_ID, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0444);
}

void boot_id_prepare(void)
{
	char line[UUID + 2];
	text_format(line, sizeof line, "%s\n", boot_id());
	if (put(open_boot_id(), line))
		boot_id_over();
}

bool boot_id_set(const char *given)
{
	char uuid[64];
	if (given)
		text_format(uuid, sizeof uuid, "%.36s\n", given);
	else if (!read_small("/proc/sys/kernel/random/uuid", uuid, sizeof uuid))
		return false;
	if (strlen(uuid) != UUID + 1 || !put(open_boot_id(), uuid))
		return false;
	memcpy(known_boot_id, uuid, UUID + 2);
	return boot_id_over();
}

bool generation_write(uint64_t generation)
{
	char line[32];
	size_t n = text_format(line, sizeof line, "%lu\n", (unsigned long)generation);
	if (put(open("/run/stoker/generation", O_WRONLY | O_NOFOLLOW | O_CLOEXEC), line))
		return true;
	mkdir("/run/stoker", 0755);
	return replace_file("/run/stoker/generation", line, n, 0444);
}

/* ---- machine-id and host keys ----------------------------------------------------------------------------------------------------- */

bool machine_id_known(void)
{
	char id[64];
	return read_small("/etc/machine-id", id, sizeof id) >= MACHINE_ID;
}

bool machine_id_set(const char *id)
{
	static const char *const copies[] = {"/run/machine-id", "/var/lib/dbus/machine-id"};
	char line[MACHINE_ID + 2];
	struct stat st;
	if (strlen(id) != MACHINE_ID || strspn(id, "0123456789abcdef") != MACHINE_ID) {
		errno = EINVAL;
		return false;
	}
	text_format(line, sizeof line, "%s\n", id);
	bool ok = write_etc("/etc/machine-id", line);
	for (int i = 0; i < 2; i++) /* usually links to the first, or not there */
		if (lstat(copies[i], &st) == 0 && S_ISREG(st.st_mode) && st.st_size)
			ok &= put(open(copies[i], O_WRONLY | O_CLOEXEC | O_NOFOLLOW), line);
	return ok;
}

bool sshd_installed(void)
{
	/* By the effective user: another user's rights have to be put together first. */
	return euidaccess("/usr/sbin/sshd", X_OK) == 0 || euidaccess("/usr/local/sbin/sshd", X_OK) == 0;
}

/* ssh_host_*_key and what belongs to it. */
static bool is_host_key(const char *name)
{
	size_t n = strlen(name);
	return !strncmp(name, "ssh_host_", 9) && n < NAME_ROOM &&
	       ((n > 4 && !strcmp(name + n - 4, "_key")) || (n > 8 && !strcmp(name + n - 8, "_key.pub")));
}

static bool among(const char *path, const struct mp *keys)
{
	const uint8_t *at = keys->body;
	for (uint32_t i = 0; i < keys->count; i++) {
		struct mp key = mp_next(keys, &at);
		const uint8_t *in = key.body;
		struct mp name = key.type == MP_ARRAY && key.count ? mp_next(&key, &in) : (struct mp){.type = MP_MISSING};
		if (mp_text_is(&name, path))
			return true;
	}
	return false;
}

unsigned host_keys(const struct mp *keep, bool remove)
{
	unsigned n = 0;
	DIR *d = opendir(SSH_KEYS);
	for (struct dirent *e; d && (e = readdir(d));) {
		char path[128];
		if (!is_host_key(e->d_name))
			continue;
		text_format(path, sizeof path, "%s/%s", SSH_KEYS, e->d_name);
		if (keep->type == MP_ARRAY && among(path, keep))
			continue;
		if (!remove || unlink(path) == 0)
			n++;
	}
	if (d)
		closedir(d);
	return n;
}

/* A copy of a machine with host keys, whose host asks first, and has made none yet. */
bool host_keys_wanted(const struct mp *m)
{
	struct mp keys = mp_get(m, "ssh_host_keys"), none = {.type = MP_MISSING};
	return mp_bool_or(m, "ask_keys", false) && (keys.type != MP_ARRAY || !keys.count) && sshd_installed() && host_keys(&none, false);
}

void host_keys_list(struct mp_writer *w)
{
	unsigned n = 0;
	mpw_str(w, "ssh_host_keys");
	size_t mark = mpw_open_array(w);
	DIR *d = opendir(SSH_KEYS);
	for (struct dirent *e; d && n < KEYS_MAX && (e = readdir(d));) {
		char path[128];
		if (!is_host_key(e->d_name) || strstr(e->d_name, ".pub"))
			continue;
		text_format(path, sizeof path, "%s/%s", SSH_KEYS, e->d_name);
		mpw_clean(w, path);
		n++;
	}
	if (d)
		closedir(d);
	mpw_close(w, mark, n);
}

bool host_keys_write(const struct mp *keys, struct failure *f)
{
	const uint8_t *at = keys->body;
	if (keys->count > KEYS_MAX)
		return fail(f, "bad_request", EINVAL, "ssh_host_keys: at most %d", KEYS_MAX);
	mkdir(SSH_KEYS, 0755);
	for (uint32_t i = 0; i < keys->count; i++) {
		struct mp key = mp_next(keys, &at), path = {.type = MP_MISSING}, mode = path, content = path;
		char name[256];
		uint64_t bits;
		if (key.type == MP_ARRAY && key.count == 3) {
			const uint8_t *in = key.body;
			path = mp_next(&key, &in);
			mode = mp_next(&key, &in);
			content = mp_next(&key, &in);
		}
		if (!mp_copy(&path, name, sizeof name) || *name != '/' || !mp_u64(&mode, &bits) || bits > 0777 || !mp_is_text(&content) || content.count > KEY_SIZE)
			return fail(f, "bad_request", EINVAL, "ssh_host_keys: path, mode and content");
		if (!replace_file(name, content.data, content.count, (mode_t)bits))
			return fail(f, "io", errno, "cannot write %.100s: %s", name, strerror(errno));
	}
	return true;
}

/* As `configure` has them. */
bool machine_id_and_keys(const struct mp *m, struct failure *f)
{
	char id[MACHINE_ID + 1];
	struct mp machine = mp_get(m, "machine_id"), keys = mp_get(m, "ssh_host_keys");
	if (mp_is_text(&machine) && machine.count && !(mp_copy(&machine, id, sizeof id) && machine_id_set(id)))
		return fail(f, "io", errno, "cannot write /etc/machine-id: %s", strerror(errno));
	if (keys.type != MP_ARRAY || !keys.count || !sshd_installed())
		return true;
	if (!host_keys_write(&keys, f))
		return false;
	host_keys(&keys, true);
	return true;
}
