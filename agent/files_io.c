/* Applets that move content or look at trees: read, write, list. */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t copy_bytes(int from, int to, uint64_t most, const char *path)
{
	static char *buffer;
	uint64_t done = 0;
	bool spliced = true;
	while (done < most) {
		uint64_t left = most - done;
		ssize_t n;
		if (spliced) {
			n = splice(from, NULL, to, NULL, left < 1 << 20 ? (size_t)left : 1 << 20, SPLICE_F_MOVE | SPLICE_F_MORE);
			if (n < 0 && (errno == EINVAL || errno == ENOSYS || errno == ESPIPE || errno == EAGAIN) && done == 0) {
				spliced = false; /* files without pages, such as those of proc, or no pipe on either side */
				continue;
			}
		} else {
			if (!buffer && !(buffer = malloc(IO_BUFFER)))
				die(NULL, ENOMEM, NULL, "out of memory");
			n = read(from, buffer, left < IO_BUFFER ? (size_t)left : IO_BUFFER);
			for (ssize_t at = 0, w; at < n; at += w) {
				w = write(to, buffer + at, (size_t)(n - at));
				if (w < 0 && errno == EINTR)
					w = 0;
				else if (w < 0)
					die_errno(path);
			}
		}
		if (n == 0)
			break;
		if (n < 0 && errno != EINTR)
			die_errno(path);
		done += n > 0 ? (uint64_t)n : 0;
	}
	return done;
}

void applet_read(void)
{
	char *path = path_argument("path", false);
	uint64_t offset = mp_u64_or(&applet_args, "offset", 0, INT64_MAX), length = mp_u64_or(&applet_args, "length", UINT64_MAX, UINT64_MAX);
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0 || fstat(fd, &st))
		die_errno(path);
	errno = EISDIR;
	if (S_ISDIR(st.st_mode))
		die_errno(path);
	if (!S_ISREG(st.st_mode))
		die("not_a_file", EINVAL, path, "%s: not a regular file", path);
	fcntl(fd, F_SETFL, 0);
	if (offset && lseek(fd, (off_t)offset, SEEK_SET) < 0)
		die_errno(path);
	copy_bytes(fd, 1, length, path);
}

/* ---- write ------------------------------------------------------------------------------------------------------------------------- */

struct target {
	const char *path, *name;
	int dir;
	bool exists;
	struct stat st; /* if it exists */
};

/* Where the bytes go in the end: a chain of links at the end of the path is followed, even if its last target is still missing. */
static void find_target(struct target *t, const char *path, bool make)
{
	char link[PATH_ROOM];
	for (int links = 0;; links++) {
		t->path = path;
		t->dir = open_parent(path, &t->name, make);
		t->exists = fstatat(t->dir, t->name, &t->st, AT_SYMLINK_NOFOLLOW) == 0;
		if (!t->exists && errno != ENOENT)
			die_errno(path);
		if (!t->exists || !S_ISLNK(t->st.st_mode))
			return;
		ssize_t n = readlinkat(t->dir, t->name, link, sizeof link - 1);
		if (n < 0 || links == 40) {
			errno = n < 0 ? errno : ELOOP;
			die_errno(path);
		}
		link[n] = 0;
		if (link[0] == '/') {
			path = strdup(link);
		} else {
			char *parent = strdup(path);
			parent[t->name - path] = 0;
			path = path_join(parent, link);
		}
		close(t->dir);
	}
}

static void check_size(uint64_t got, const char *path)
{
	struct mp v = mp_get(&applet_args, "size");
	if (v.type == MP_UINT && v.u != got)
		die("short_input", EIO, path, "%s: %lu bytes came, not %lu", path, (unsigned long)got, (unsigned long)v.u);
}

static void write_through(const struct target *t, int flags, mode_t mode)
{
	int fd = openat(t->dir, t->name, O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags, mode);
	if (fd < 0)
		die_errno(t->path);
	fcntl(fd, F_SETFL, flags & O_APPEND);
	/* splice refuses files opened for appending; copy_bytes finds that out by itself. */
	check_size(copy_bytes(0, fd, UINT64_MAX, t->path), t->path);
	struct mp m = mp_get(&applet_args, "mode");
	if (m.type == MP_UINT && !t->exists && fchmod(fd, mode))
		die_errno(t->path);
	close(fd);
}

/* A file without a name first, so that not even SIGKILL leaves half a file. Not every file system has such files. */
static int open_temporary(const struct target *t, const char **name)
{
	*name = NULL;
	int fd = openat(t->dir, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
	if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT))
		return fd;
	*name = text_temporary();
	return openat(t->dir, *name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
}

static bool give_name(const struct target *t, int fd, const char **temporary, bool exclusive)
{
	char proc[32];
	text_format(proc, sizeof proc, "/proc/self/fd/%d", fd);
	if (!*temporary) {
		if (linkat(AT_FDCWD, proc, t->dir, t->name, AT_SYMLINK_FOLLOW) == 0)
			return true;
		if (errno != EEXIST || exclusive)
			return false;
		/* A link never replaces anything, a rename does. */
		*temporary = text_temporary();
		if (linkat(AT_FDCWD, proc, t->dir, *temporary, AT_SYMLINK_FOLLOW)) {
			*temporary = NULL;
			return false;
		}
	} else if (exclusive) {
		bool done = linkat(t->dir, *temporary, t->dir, t->name, 0) == 0;
		int error = errno;
		unlinkat(t->dir, *temporary, 0);
		errno = error;
		return done;
	}
	return renameat(t->dir, *temporary, t->dir, t->name) == 0;
}

static void replace_whole(const struct target *t, bool exclusive)
{
	struct mp m = mp_get(&applet_args, "mode");
	const char *temporary;
	int fd = open_temporary(t, &temporary);
	if (fd < 0)
		die_errno(t->path);
	uint64_t got = copy_bytes(0, fd, UINT64_MAX, t->path);
	struct mp size = mp_get(&applet_args, "size");
	if (temporary && size.type == MP_UINT && size.u != got)
		unlinkat(t->dir, temporary, 0);
	check_size(got, t->path);
	/* Owner first: changing it takes the set-id bits away. */
	if (t->exists && (t->st.st_uid != geteuid() || t->st.st_gid != getegid()) && fchown(fd, t->st.st_uid, t->st.st_gid))
		errno = 0; /* not ours to give: it belongs to who wrote it */
	bool ok = true;
	if (m.type == MP_UINT)
		ok = fchmod(fd, (mode_t)(m.u & 07777)) == 0;
	else if (t->exists)
		ok = fchmod(fd, t->st.st_mode & 07777) == 0;
	if (ok && give_name(t, fd, &temporary, exclusive))
		return;
	int error = errno;
	if (temporary)
		unlinkat(t->dir, temporary, 0);
	errno = error;
	die_errno(t->path);
}

void applet_write(void)
{
	char *path = path_argument("path", false);
	bool exclusive = mp_bool_or(&applet_args, "exclusive", false), append = mp_bool_or(&applet_args, "append", false);
	struct mp m = mp_get(&applet_args, "mode");
	struct target t;
	find_target(&t, path, mp_bool_or(&applet_args, "parents", true));
	if (t.exists && (exclusive || S_ISDIR(t.st.st_mode))) {
		errno = exclusive ? EEXIST : EISDIR;
		die_errno(path);
	}
	/* Replacing needs no right to the old file itself; but whoever may not write it must not be able to by this road. */
	if (t.exists && S_ISREG(t.st.st_mode) && faccessat(t.dir, t.name, W_OK, AT_EACCESS))
		die_errno(path);
	if (append)
		write_through(&t, O_APPEND | O_CREAT | (exclusive ? O_EXCL : 0), m.type == MP_UINT ? (mode_t)(m.u & 07777) : 0666);
	else if (t.exists && !S_ISREG(t.st.st_mode))
		write_through(&t, 0, 0);
	else
		replace_whole(&t, exclusive);
	out_entry_of(path, true);
}

/* ---- list -------------------------------------------------------------------------------------------------------------------------- */

static uint64_t entries_left;
static uint32_t unreadable;
static bool truncated;

static void list_below(int dir, const char *path, unsigned depth)
{
	size_t n;
	bool more;
	char **names = directory_names(dir, (size_t)entries_left, &n, &more);
	truncated |= more;
	for (size_t i = 0; i < n; i++) {
		char *below = path_join(path, names[i]);
		struct stat st;
		if (!entries_left) {
			truncated = true;
		} else if (fstatat(dir, names[i], &st, AT_SYMLINK_NOFOLLOW) == 0) {
			entries_left--;
			out_entry(dir, names[i], below, &st);
			if (S_ISDIR(st.st_mode) && depth > 1) {
				int sub = openat(dir, names[i], O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
				if (sub < 0)
					unreadable++;
				else
					list_below(sub, below, depth - 1);
			}
		}
		free(below);
		free(names[i]);
	}
	free(names);
	close(dir);
}

void applet_list(void)
{
	char *path = path_argument("path", false);
	unsigned depth = (unsigned)mp_u64_or(&applet_args, "depth", 1, 64);
	entries_left = mp_u64_or(&applet_args, "limit", 10000, 1000000);
	int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (mp_bool_or(&applet_args, "follow", true) ? 0 : O_NOFOLLOW));
	if (dir < 0)
		die_errno(path);
	list_below(dir, path, depth ? depth : 1);
	uint8_t buffer[64];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 3);
	mpw_key_bool(&w, "end", true);
	mpw_key_bool(&w, "truncated", truncated);
	mpw_key_uint(&w, "unreadable", unreadable);
	out_record(&w);
}
