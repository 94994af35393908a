/* The mounts that configure names: further disks, found by their serial numbers, below the machine's root. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* From linux/ext4.h, which is not installed. */
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)

enum { WAIT_MS = 5000, MOUNTS_MAX = 64, SERIAL_ROOM = 24 };

unsigned long mount_flags(const struct mp *names)
{
	static const struct {
		const char *name;
		unsigned long flag;
	} known[] = {{"ro", MS_RDONLY},       {"nosuid", MS_NOSUID},     {"nodev", MS_NODEV},       {"noexec", MS_NOEXEC},
		     {"noatime", MS_NOATIME}, {"relatime", MS_RELATIME}, {"nodiratime", MS_NODIRATIME}, {"sync", MS_SYNCHRONOUS},
		     {"lazytime", MS_LAZYTIME}};
	unsigned long flags = 0;
	if (names->type == MP_ARRAY) {
		const uint8_t *at = names->body;
		for (uint32_t i = 0; i < names->count; i++) {
			struct mp name = mp_next(names, &at);
			for (size_t k = 0; k < sizeof known / sizeof *known; k++)
				if (mp_text_is(&name, known[k].name))
					flags |= known[k].flag;
		}
	}
	return flags;
}

/* The device may be larger than its file system. Growing is done by the kernel, on the mounted file system; where it cannot be
 * (another type, no resize inode), the machine works all the same. */
void mount_grow(const char *device, const char *path)
{
	uint64_t bytes;
	int error = mount_enlarge(device, path, &bytes);
	if (error && error != EINVAL)
		logf_host("warning", "cannot grow the file system of %s: %s", device, strerror(error));
}

int mount_enlarge(const char *device, const char *path, uint64_t *size)
{
	off_t bytes = 0;
	uint64_t blocks;
	struct stat above, below;
	struct statfs st;
	int error = 0, disk = open(device, O_RDONLY | O_CLOEXEC), root = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (disk < 0 || root < 0 || (bytes = lseek(disk, 0, SEEK_END)) < 0 || fstatfs(root, &st)) {
		error = errno;
	} else if (fstat(root, &above) || fstat(disk, &below) || above.st_dev != below.st_rdev) {
		error = ENXIO; /* something else is there: unmounted, or hidden below another mount */
	} else if (st.f_bsize > 0) {
		blocks = (uint64_t)bytes / (uint64_t)st.f_bsize;
		if (ioctl(root, EXT4_IOC_RESIZE_FS, &blocks))
			error = errno;
	}
	*size = bytes > 0 ? (uint64_t)bytes : 0;
	if (disk >= 0)
		close(disk);
	if (root >= 0)
		close(root);
	return error;
}

bool mount_wait(const char *device)
{
	for (int tries = 0; access(device, F_OK); tries++) {
		if (tries == WAIT_MS)
			return false;
		usleep(1000);
	}
	return true;
}

bool mount_find(const char *serial, char *device, size_t size)
{
	DIR *d = opendir("/sys/block");
	bool found = false;
	for (struct dirent *e; d && !found && (e = readdir(d));) {
		char path[300], text[SERIAL_ROOM];
		text_format(path, sizeof path, "/sys/block/%.128s/serial", e->d_name);
		if (e->d_name[0] == '.' || !read_small(path, text, sizeof text))
			continue;
		text[strcspn(text, "\n")] = 0;
		found = !strcmp(text, serial);
		if (found)
			text_format(device, size, "/dev/%.128s", e->d_name);
	}
	if (d)
		closedir(d);
	return found;
}

/* Disks are found by the kernel one after the other, while we are running. */
static bool wait_for_serial(const char *serial, char *device, size_t size)
{
	for (int tries = 0; !mount_find(serial, device, size); tries++) {
		if (tries == WAIT_MS)
			return false;
		usleep(1000);
	}
	return mount_wait(device);
}

/* Every directory of a path. Links in it are followed as the guest's own programs follow them: there is nothing outside of its root. */
static bool make_path(char *path)
{
	struct stat st;
	for (char *at = path + 1;; at++) {
		if (*at && *at != '/')
			continue;
		char kept = *at;
		*at = 0;
		bool ok = mkdir(path, 0755) == 0 || (errno == EEXIST && stat(path, &st) == 0 && S_ISDIR(st.st_mode));
		int error = ok ? 0 : errno == EEXIST ? ENOTDIR : errno;
		*at = kept;
		if (!ok) {
			errno = error;
			return false;
		}
		if (!kept)
			return true;
	}
}

bool mount_disk(const char *device, const char *path, const char *type, const struct mp *flags, char *options)
{
	if (!mount(device, path, type, mount_flags(flags), options))
		return true;
	/* What older kernels do not know, and can do without, comes last. */
	char *last = errno == EINVAL ? strrchr(options, ',') : NULL;
	if (!last)
		return false;
	*last = '\0';
	return !mount(device, path, type, mount_flags(flags), options);
}

static bool mount_one(const struct mp *m, struct failure *f)
{
	char serial[SERIAL_ROOM] = "", device[160] = "", path[PATH_ROOM], type[32] = "ext4", options[512] = "";
	struct mp s = mp_get(m, "serial"), d = mp_get(m, "device"), p = mp_get(m, "path"), t = mp_get(m, "fstype"), flags = mp_get(m, "flags"),
		  o = mp_get(m, "options");
	if ((mp_is_text(&s) && !mp_copy(&s, serial, sizeof serial)) || (mp_is_text(&d) && !mp_copy(&d, device, sizeof device)) ||
	    !mp_copy(&p, path, sizeof path) || path[0] != '/' || !path[1] || (mp_is_text(&t) && !mp_copy(&t, type, sizeof type)) ||
	    (mp_is_text(&o) && !mp_copy(&o, options, sizeof options)) || !*serial == !*device)
		return fail(f, "bad_request", EINVAL, "mounts: serial or device, path, fstype and options");
	if (*serial ? !wait_for_serial(serial, device, sizeof device) : !mount_wait(device))
		return fail(f, "mount_failed", ENODEV, "there is no disk %s for %.100s", *serial ? serial : device, path);
	if (!make_path(path))
		return fail(f, "mount_failed", errno, "cannot make the directory %.100s: %s", path, strerror(errno));
	if (!mount_disk(device, path, type, &flags, options))
		return fail(f, "mount_failed", errno, "cannot mount %s at %.100s: %s", *serial ? serial : device, path, strerror(errno));
	if (mp_bool_or(m, "grow", false))
		mount_grow(device, path);
	return true;
}

bool mount_all(const struct mp *mounts, struct failure *f)
{
	if (mounts->type != MP_ARRAY)
		return true;
	if (mounts->count > MOUNTS_MAX)
		return fail(f, "bad_request", EINVAL, "mounts: at most %d", MOUNTS_MAX);
	const uint8_t *at = mounts->body;
	for (uint32_t i = 0; i < mounts->count; i++) {
		struct mp one = mp_next(mounts, &at);
		if (one.type != MP_MAP)
			return fail(f, "bad_request", EINVAL, "mounts: a list of maps");
		if (!mount_one(&one, f))
			return false;
	}
	return true;
}

/* A field of /proc/self/mounts, where white space and backslashes are written in octal. */
static void unescape(char *s)
{
	char *to = s;
	for (; *s; s++, to++) {
		bool octal = s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3];
		*to = (char)(octal ? (s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0') : *s);
		s += octal ? 3 : 0;
	}
	*to = 0;
}

unsigned mount_lines(struct mount_line *lines, unsigned most)
{
	static char text[65536];
	unsigned n = 0;
	read_small("/proc/self/mounts", text, sizeof text);
	for (char *at = text; *at && n < most;) {
		struct mount_line l = {.source = at};
		at += strcspn(at, "\n");
		if (*at)
			*at++ = 0;
		l.target = strchr(l.source, ' ');
		l.type = l.target ? strchr(l.target + 1, ' ') : NULL;
		if (!l.type)
			continue;
		*l.target++ = *l.type++ = 0;
		l.type[strcspn(l.type, " ")] = 0;
		unescape(l.target);
		lines[n++] = l;
	}
	return n;
}
