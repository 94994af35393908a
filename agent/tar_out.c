/* tar-out: a tree as a POSIX tar. */
#define _GNU_SOURCE
#include "files.h"
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { LINKS = 4096, PIECES = 1 << 16 };

static bool exact; /* also holes, extended attributes, and times to the nanosecond */

/* Files with several names, by where they are: the second name becomes a hard link to the first. */
static struct link {
	struct link *next;
	dev_t dev;
	ino_t ino;
	char name[];
} *links[LINKS];
static unsigned link_count;
static uint64_t content_left;

static const char *seen_before(const struct stat *st, const char *name)
{
	struct link **bucket = &links[st->st_ino % LINKS], *l = *bucket;
	for (; l; l = l->next)
		if (l->dev == st->st_dev && l->ino == st->st_ino)
			return l->name;
	size_t n = strlen(name) + 1;
	/* Beyond a million files with several names the rest become copies: memory has an end. */
	if (link_count++ < 1000000 && (l = malloc(sizeof *l + n))) {
		l->next = *bucket;
		l->dev = st->st_dev;
		l->ino = st->st_ino;
		memcpy(l->name, name, n);
		*bucket = l;
	}
	return NULL;
}

/* Octal digits and a NUL. False: it does not fit. */
static bool octal(char *field, size_t size, uint64_t v)
{
	for (size_t i = size - 1; i--; v >>= 3)
		field[i] = (char)('0' + (v & 7));
	field[size - 1] = 0;
	return v == 0;
}

static struct {
	char data[256 << 10];
	size_t length;
} pax;

/* "LENGTH key=value\n", where LENGTH counts its own digits. */
static void pax_bytes(const char *key, const void *value, size_t size)
{
	size_t body = strlen(key) + size + 3, total = body + 1, digits = 1;
	for (size_t ten = 10; total >= ten; ten *= 10) {
		digits++;
		total = body + digits;
	}
	if (total + 1 >= sizeof pax.data - pax.length)
		die("too_many", EFBIG, NULL, "more than %d bytes of names and attributes", (int)sizeof pax.data);
	char *at = pax.data + pax.length;
	at += text_format(at, sizeof pax.data - pax.length, "%lu %s=", (unsigned long)total, key);
	memcpy(at, value, size);
	at[size] = '\n';
	pax.length += total;
}

static void pax_add(const char *key, const char *value)
{
	pax_bytes(key, value, strlen(value));
}

static void pax_number(const char *key, int64_t v)
{
	char text[24];
	text_format(text, sizeof text, "%ld", (long)v);
	pax_add(key, text);
}

static bool ascii(const char *s)
{
	while (*s > 0)
		s++;
	return !*s;
}

/* Into name and prefix, cut at a slash; else false. */
static bool place_name(struct tar_header *h, const char *name)
{
	size_t n = strlen(name);
	if (n <= sizeof h->name) {
		memcpy(h->name, name, n);
		return true;
	}
	for (const char *slash = strchr(name, '/'); slash; slash = strchr(slash + 1, '/')) {
		size_t before = (size_t)(slash - name), after = n - before - 1;
		if (before && before <= sizeof h->prefix && after && after <= sizeof h->name) {
			memcpy(h->prefix, name, before);
			memcpy(h->name, slash + 1, after);
			return true;
		}
	}
	memcpy(h->name, name, sizeof h->name); /* for readers that do not know pax */
	return false;
}

static void pad(uint64_t size)
{
	static const char zeros[TAR_BLOCK];
	out_bytes(zeros, (size_t)(-size & (TAR_BLOCK - 1)));
}

static void emit(struct tar_header *h)
{
	unsigned sum = 0;
	memcpy(h->magic, "ustar", 6);
	memcpy(h->version, "00", 2);
	memset(h->checksum, ' ', sizeof h->checksum);
	for (size_t i = 0; i < sizeof *h; i++)
		sum += ((const uint8_t *)h)[i];
	octal(h->checksum, 7, sum);
	out_bytes(h, sizeof *h);
}

static void emit_pax(void)
{
	if (!pax.length)
		return;
	struct tar_header h = {0};
	memcpy(h.name, "pax", 4);
	octal(h.mode, 8, 0644);
	octal(h.uid, 8, 0);
	octal(h.gid, 8, 0);
	octal(h.size, 12, pax.length);
	octal(h.mtime, 12, 0);
	h.type = 'x';
	emit(&h);
	out_bytes(pax.data, pax.length);
	pad(pax.length);
}

/* `dir` and `last`: where the entry is, for its attributes. `holes`: the content begins with a map of the file's `real` bytes. */
struct origin {
	int dir;
	const char *last, *path;
	bool holes;
	uint64_t real;
};

static void add_exact(const struct stat *st, const char *name, char type, const struct origin *from)
{
	char place[NAME_MAX + 64], text[40];
	if (from->holes) {
		pax_add("GNU.sparse.major", "1");
		pax_add("GNU.sparse.minor", "0");
		pax_add("GNU.sparse.name", name);
		pax_number("GNU.sparse.realsize", (int64_t)from->real);
	}
	if (st->st_mtim.tv_nsec && st->st_mtime >= 0) {
		text_format(text, sizeof text, "%ld.%09ld", (long)st->st_mtime, (long)st->st_mtim.tv_nsec);
		pax_add("mtime", text);
	}
	if (type == '1')
		return; /* the attributes are the first name's */
	text_format(place, sizeof place, "/proc/self/fd/%d/%s", from->dir, from->last);
	tar_xattrs_of(from->dir == AT_FDCWD ? from->path : place, from->path, pax_bytes);
}

static void header(const struct stat *st, const char *name, char type, const char *link, uint64_t size, const struct origin *from)
{
	struct tar_header h = {0};
	pax.length = 0;
	if (exact)
		add_exact(st, name, type, from);
	if (!place_name(&h, name) || !ascii(name))
		pax_add("path", name);
	if (link && (strlen(link) > sizeof h.link || !ascii(link)))
		pax_add("linkpath", link);
	if (link)
		memcpy(h.link, link, strnlen(link, sizeof h.link));
	octal(h.mode, 8, st->st_mode & 07777);
	if (!octal(h.uid, 8, st->st_uid))
		pax_number("uid", st->st_uid);
	if (!octal(h.gid, 8, st->st_gid))
		pax_number("gid", st->st_gid);
	if (!octal(h.size, 12, size))
		pax_number("size", (int64_t)size);
	if (st->st_mtime < 0 || !octal(h.mtime, 12, (uint64_t)st->st_mtime)) {
		octal(h.mtime, 12, 0);
		if (!exact || !st->st_mtim.tv_nsec || st->st_mtime < 0)
			pax_number("mtime", st->st_mtime);
	}
	h.type = type;
	if (type == '3' || type == '4') {
		octal(h.major, 8, major(st->st_rdev));
		octal(h.minor, 8, minor(st->st_rdev));
	}
	const char *user = account_name(st->st_uid, false), *group = account_name(st->st_gid, true);
	memcpy(h.user, user, strnlen(user, sizeof h.user - 1));
	memcpy(h.group, group, strnlen(group, sizeof h.group - 1));
	emit_pax();
	emit(&h);
}

static void put_content(int fd, uint64_t size, const char *path)
{
	static const char zeros[TAR_BLOCK];
	if (size > content_left)
		die("too_many", EFBIG, path, "%s: more than the limit", path);
	content_left -= size;
	out_flush();
	uint64_t got = copy_bytes(fd, 1, size, path);
	for (uint64_t left = size - got; left;) { /* it shrank: the header has promised */
		size_t n = left < sizeof zeros ? (size_t)left : sizeof zeros;
		out_bytes(zeros, n);
		left -= n;
	}
}

/* Where a file has data, and what it comes to. False: it has no holes, or in too many pieces: then it goes as it is. */
struct pieces {
	uint64_t offset[PIECES], size[PIECES], total;
	unsigned count;
};

static bool find_pieces(int fd, const struct stat *st, struct pieces *p)
{
	p->count = 0;
	p->total = 0;
	if ((uint64_t)st->st_blocks * 512 >= (uint64_t)st->st_size)
		return false;
	for (off_t at = 0; at < st->st_size && p->count < PIECES - 1; p->count++) {
		off_t data = lseek(fd, at, SEEK_DATA), end = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
		if (data < 0 && errno == ENXIO)
			break;
		if (end < 0)
			return false;
		at = end < st->st_size ? end : st->st_size;
		p->offset[p->count] = (uint64_t)data;
		p->size[p->count] = (uint64_t)(at - data);
		p->total += (uint64_t)(at - data);
	}
	if (p->count == PIECES - 1)
		return false;
	p->offset[p->count] = (uint64_t)st->st_size; /* the end is always said */
	p->size[p->count++] = 0;
	return p->total < (uint64_t)st->st_size;
}

/* GNU's sparse format 1.0: the map as decimal lines in whole blocks, then the data without the holes. */
static void put_sparse(int fd, const struct stat *st, const struct pieces *p, const char *as, struct origin *from)
{
	size_t room = (size_t)p->count * 42 + 32, n;
	char *map = malloc(room);
	if (!map)
		die(NULL, ENOMEM, from->path, "out of memory");
	n = text_format(map, room, "%u\n", p->count);
	for (unsigned i = 0; i < p->count; i++)
		n += text_format(map + n, room - n, "%lu\n%lu\n", (unsigned long)p->offset[i], (unsigned long)p->size[i]);
	size_t whole = (n + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK;
	from->holes = true;
	from->real = (uint64_t)st->st_size;
	header(st, as, '0', NULL, whole + p->total, from);
	out_bytes(map, n);
	pad(n);
	free(map);
	for (unsigned i = 0; i < p->count; i++) {
		if (!p->size[i])
			continue;
		if (lseek(fd, (off_t)p->offset[i], SEEK_SET) < 0)
			die_errno(from->path);
		put_content(fd, p->size[i], from->path);
	}
	pad(p->total);
}

/* File systems that are views of the kernel, not content. */
static bool kernel_made(int dir)
{
	struct statfs fs;
	if (fstatfs(dir, &fs))
		return false;
	switch ((unsigned long)fs.f_type) {
	case 0x9fa0: case 0x62656572: case 0x27e0eb: case 0x63677270: case 0x64626720: case 0x74726163: case 0xcafe4a11: case 0x73636673:
		return true;
	default:
		return false;
	}
}

static void put(int dir, const char *name, const char *path, const char *as, int depth);

static void put_directory(int dir, const char *name, const char *path, const char *as, const struct stat *st, int depth)
{
	char *entry = path_join(as, "");
	struct origin from = {dir, name, path, false, 0};
	header(st, entry, '5', NULL, 0, &from);
	int sub = openat(dir, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (depth ? O_NOFOLLOW : 0));
	if (sub < 0)
		die_errno(path);
	if (depth == TREE_DEPTH)
		die("too_many", ELOOP, path, "%s: more than %d directories deep", path, TREE_DEPTH);
	size_t n = 0;
	bool more;
	char **names = kernel_made(sub) ? NULL : directory_names(sub, SIZE_MAX, &n, &more);
	for (size_t i = 0; i < n; i++) {
		char *below = path_join(path, names[i]), *inside = path_join(entry, names[i]);
		put(sub, names[i], below, inside, depth + 1);
		free(below);
		free(inside);
		free(names[i]);
	}
	free(names);
	free(entry);
	close(sub);
}

static void put_file(int dir, const char *name, const char *path, const char *as, struct stat *st, int depth)
{
	int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | (depth ? O_NOFOLLOW : 0));
	if (fd < 0 && errno == ENOENT && depth)
		return; /* it went meanwhile */
	if (fd < 0 || fstat(fd, st))
		die_errno(path);
	static struct pieces pieces;
	struct origin from = {dir, name, path, false, 0};
	const char *first = st->st_nlink > 1 ? seen_before(st, as) : NULL;
	if (first) {
		header(st, as, '1', first, 0, &from);
	} else if (exact && find_pieces(fd, st, &pieces)) {
		put_sparse(fd, st, &pieces, as, &from);
	} else {
		header(st, as, '0', NULL, (uint64_t)st->st_size, &from);
		lseek(fd, 0, SEEK_SET);
		put_content(fd, (uint64_t)st->st_size, path);
		pad((uint64_t)st->st_size);
	}
	close(fd);
}

static void put(int dir, const char *name, const char *path, const char *as, int depth)
{
	char target[PATH_ROOM];
	struct stat st;
	struct origin from = {dir, name, path, false, 0};
	/* Only what was asked for may be a link to it; below, links are entries. */
	if (fstatat(dir, name, &st, depth ? AT_SYMLINK_NOFOLLOW : 0)) {
		if (errno == ENOENT && depth)
			return;
		die_errno(path);
	}
	switch (st.st_mode & S_IFMT) {
	case S_IFDIR:
		put_directory(dir, name, path, as, &st, depth);
		break;
	case S_IFREG:
		put_file(dir, name, path, as, &st, depth);
		break;
	case S_IFLNK: {
		ssize_t n = readlinkat(dir, name, target, sizeof target - 1);
		if (n < 0)
			die_errno(path);
		target[n] = 0;
		header(&st, as, '2', target, 0, &from);
		break;
	}
	case S_IFCHR:
		header(&st, as, '3', NULL, 0, &from);
		break;
	case S_IFBLK:
		header(&st, as, '4', NULL, 0, &from);
		break;
	case S_IFIFO:
		header(&st, as, '6', NULL, 0, &from);
		break;
	default: /* sockets mean nothing elsewhere */
		break;
	}
}

void tar_write_tree(const char *path, const char *as, uint64_t limit)
{
	static const char end[2 * TAR_BLOCK];
	struct stat st;
	content_left = limit;
	bool link = lstat(path, &st) == 0 && S_ISLNK(st.st_mode);
	/* A link that is to be moved is moved itself: depth 1. */
	put(AT_FDCWD, path, path, as, link && limit == UINT64_MAX ? 1 : 0);
	out_bytes(end, sizeof end);
}

void applet_tar_out(void)
{
	char *path = path_argument("path", false);
	uint64_t limit = mp_u64_or(&applet_args, "limit", INT64_MAX, INT64_MAX);
	struct stat st;
	exact = mp_bool_or(&applet_args, "exact", false);
	if (stat(path, &st))
		die_errno(path);
	tar_write_tree(path, S_ISDIR(st.st_mode) ? "." : path_name(path), limit);
}
