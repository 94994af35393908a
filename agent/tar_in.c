/* tar-in: unpacks below a directory and never leaves it. Every name is resolved by the kernel with the target as its border
 * (openat2); the archive is hostile input like any other. */
#define _GNU_SOURCE
#include "files.h"
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { SPARSE_MAX = 1 << 20 };

struct entry {
	char type;
	char *name, *link; /* NUL-terminated, malloc'ed */
	uint64_t size;
	uint32_t uid, gid, major, minor;
	mode_t mode;
	struct timespec mtime;
	bool sparse; /* its content begins with a map; `real_size` is the file's */
	uint64_t real_size;
	struct tar_xattr *xattrs;
};

static int root;
static bool keep_owners, whole_root;

static struct later { /* directories get their times and modes when nothing is written into them any more */
	struct later *next;
	mode_t mode;
	struct timespec mtime;
	struct tar_xattr *xattrs;
	char name[];
} *later;
static unsigned later_count;

static void bad_archive(const char *name, const char *why)
{
	die("bad_archive", EBADMSG, name, "%s: %s", name ? name : "the archive", why);
}

static bool read_exactly(void *data, size_t n)
{
	uint8_t *p = data;
	while (n) {
		ssize_t r = read(0, p, n);
		if (r == 0 || (r < 0 && errno != EINTR))
			return false;
		if (r > 0) {
			p += r;
			n -= (size_t)r;
		}
	}
	return true;
}

static void must_read(void *data, size_t n)
{
	if (!read_exactly(data, n))
		die("short_input", EIO, NULL, "the archive ends in the middle");
}

static void skip(uint64_t n)
{
	char buffer[4096];
	while (n) {
		size_t part = n < sizeof buffer ? (size_t)n : sizeof buffer;
		must_read(buffer, part);
		n -= part;
	}
}

static uint64_t padding(uint64_t size)
{
	return -size & (TAR_BLOCK - 1);
}

/* ---- headers ------------------------------------------------------------------------------------------------------------------------ */

/* Octal, or (GNU) big-endian binary when the first bit is set. */
static uint64_t number(const char *field, size_t size)
{
	const uint8_t *p = (const uint8_t *)field;
	uint64_t v = 0;
	if (p[0] & 0x80) {
		for (size_t i = 0; i < size; i++)
			v = v << 8 | (i ? p[i] : p[i] & 0x7f);
		return v;
	}
	size_t i = 0;
	while (i < size && p[i] == ' ')
		i++;
	for (; i < size && p[i] >= '0' && p[i] <= '7'; i++)
		v = v << 3 | (uint64_t)(p[i] - '0');
	return v;
}

static bool checksum_good(const struct tar_header *h)
{
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
	return true; /* no fuzzer would ever come further */
#endif
	unsigned sum = 0;
	const uint8_t *p = (const uint8_t *)h;
	size_t at = (size_t)(h->checksum - (const char *)h);
	for (size_t i = 0; i < sizeof *h; i++)
		sum += i >= at && i < at + sizeof h->checksum ? ' ' : p[i];
	return sum == number(h->checksum, sizeof h->checksum);
}

static char *text(const char *s, size_t n)
{
	char *out = strndup(s, n);
	if (!out)
		die(NULL, ENOMEM, NULL, "out of memory");
	return out;
}

static char *read_text(uint64_t size)
{
	if (size > TAR_PAX_MAX)
		bad_archive(NULL, "a header is too long");
	char *out = malloc((size_t)size + 1);
	if (!out)
		die(NULL, ENOMEM, NULL, "out of memory");
	must_read(out, (size_t)size);
	out[size] = 0;
	skip(padding(size));
	return out;
}

struct overrides { /* what pax and GNU headers say about the next entry */
	char *path, *link, *sparse_name;
	bool has_size, has_uid, has_gid, has_mtime, sparse, has_real_size;
	uint64_t size, real_size;
	struct tar_xattr *xattrs;
	uint32_t uid, gid;
	struct timespec mtime;
};

static struct timespec decimal_time(const char *s)
{
	char *end;
	bool before = *s == '-';
	struct timespec t = {.tv_sec = (time_t)text_number(s + before, &end)};
	if (before)
		t.tv_sec = -t.tv_sec;
	long scale = 100000000;
	if (*end == '.')
		for (end++; *end >= '0' && *end <= '9' && scale; end++, scale /= 10)
			t.tv_nsec += (*end - '0') * scale;
	return t;
}

static void pax_record(struct overrides *o, const char *key, const char *value, size_t length)
{
	if (!strcmp(key, "path")) {
		free(o->path);
		o->path = text(value, length);
	} else if (!strcmp(key, "linkpath")) {
		free(o->link);
		o->link = text(value, length);
	} else if (!strcmp(key, "size")) {
		o->size = text_number(value, NULL);
		o->has_size = true;
	} else if (!strcmp(key, "uid")) {
		o->uid = (uint32_t)text_number(value, NULL);
		o->has_uid = true;
	} else if (!strcmp(key, "gid")) {
		o->gid = (uint32_t)text_number(value, NULL);
		o->has_gid = true;
	} else if (!strcmp(key, "mtime")) {
		o->mtime = decimal_time(value);
		o->has_mtime = true;
	} else if (!strcmp(key, "GNU.sparse.major") || !strcmp(key, "GNU.sparse.minor")) {
		if (strcmp(value, key[12] == 'a' ? "1" : "0"))
			bad_archive(NULL, "only sparse files of format 1.0 are supported");
		o->sparse = true;
	} else if (!strcmp(key, "GNU.sparse.name")) {
		free(o->sparse_name);
		o->sparse_name = text(value, length);
	} else if (!strcmp(key, "GNU.sparse.realsize")) {
		o->real_size = text_number(value, NULL);
		o->has_real_size = true;
	} else if (!strncmp(key, "GNU.sparse.", 11)) {
		bad_archive(NULL, "only sparse files of format 1.0 are supported");
	} else if (keep_owners && !strncmp(key, TAR_XATTR, sizeof TAR_XATTR - 1)) {
		tar_xattr_keep(&o->xattrs, key + sizeof TAR_XATTR - 1, value, length);
	}
}

static void pax_parse(struct overrides *o, char *data, uint64_t size)
{
	char *at = data, *end = data + size;
	while (at < end) {
		char *digits;
		unsigned long n = text_number(at, &digits);
		if (n < 5 || n > (size_t)(end - at) || *digits != ' ' || at[n - 1] != '\n' || digits + 1 >= at + n)
			bad_archive(NULL, "a pax header is damaged");
		char *key = digits + 1, *equals = memchr(key, '=', (size_t)(at + n - key));
		if (!equals)
			bad_archive(NULL, "a pax header is damaged");
		*equals = 0;
		at[n - 1] = 0;
		pax_record(o, key, equals + 1, (size_t)(at + n - 1 - (equals + 1)));
		at += n;
	}
}

static bool zero_block(const struct tar_header *h)
{
	const uint8_t *p = (const uint8_t *)h;
	for (size_t i = 0; i < sizeof *h; i++)
		if (p[i])
			return false;
	return true;
}

static char *name_of(const struct tar_header *h)
{
	char name[sizeof h->prefix + sizeof h->name + 2];
	size_t n = memcmp(h->magic, "ustar", 6) ? 0 : strnlen(h->prefix, sizeof h->prefix), m = strnlen(h->name, sizeof h->name);
	memcpy(name, h->prefix, n);
	if (n)
		name[n++] = '/';
	memcpy(name + n, h->name, m);
	return text(name, n + m);
}

/* The next real entry, with everything that headers before it said about it. False at the end of the archive. */
static bool next_entry(struct entry *e)
{
	struct tar_header h;
	struct overrides o = {0};
	for (;;) {
		if (!read_exactly(&h, sizeof h))
			die("short_input", EIO, NULL, "the archive ends in the middle");
		if (zero_block(&h))
			return false;
		if (!checksum_good(&h))
			bad_archive(NULL, "not a tar, or damaged");
		uint64_t size = number(h.size, sizeof h.size);
		if (h.type == 'x') {
			char *data = read_text(size);
			pax_parse(&o, data, size);
			free(data);
		} else if (h.type == 'g') {
			free(read_text(size));
		} else if (h.type == 'L') {
			free(o.path);
			o.path = read_text(size);
		} else if (h.type == 'K') {
			free(o.link);
			o.link = read_text(size);
		} else {
			break;
		}
	}
	if (o.sparse && o.sparse_name) {
		free(o.path);
		o.path = o.sparse_name;
	}
	*e = (struct entry){
		.type = h.type,
		.sparse = o.sparse,
		.real_size = o.real_size,
		.xattrs = o.xattrs,
		.name = o.path ? o.path : name_of(&h),
		.link = o.link ? o.link : text(h.link, strnlen(h.link, sizeof h.link)),
		.size = o.has_size ? o.size : number(h.size, sizeof h.size),
		.uid = o.has_uid ? o.uid : (uint32_t)number(h.uid, sizeof h.uid),
		.gid = o.has_gid ? o.gid : (uint32_t)number(h.gid, sizeof h.gid),
		.major = (uint32_t)number(h.major, sizeof h.major),
		.minor = (uint32_t)number(h.minor, sizeof h.minor),
		.mode = (mode_t)(number(h.mode, sizeof h.mode) & 07777),
	};
	e->mtime = o.has_mtime ? o.mtime : (struct timespec){.tv_sec = (time_t)number(h.mtime, sizeof h.mtime)};
	if (e->size > INT64_MAX || e->real_size > INT64_MAX || (o.sparse && !o.has_real_size))
		bad_archive(e->name, "an impossible size");
	return true;
}

/* ---- places below the target -------------------------------------------------------------------------------------------------------- */

/* Without leading and doubled slashes and dots. Ends the applet for names that point outside. */
static char *relative(const char *name)
{
	char *out = text(name, strlen(name)), *to = out;
	if (name[0] == '/')
		bad_archive(name, "an absolute name");
	for (const char *at = name; *at;) {
		at += strspn(at, "/");
		size_t n = strcspn(at, "/");
		if (n == 2 && at[0] == '.' && at[1] == '.')
			bad_archive(name, "a name that leads out of the target");
		if (n && !(n == 1 && *at == '.')) {
			if (to != out)
				*to++ = '/';
			memmove(to, at, n);
			to += n;
		}
		at += n;
	}
	*to = 0;
	return out;
}

static int open_below(const char *path, uint64_t flags)
{
	struct open_how how = {.flags = flags | O_CLOEXEC,
			       .resolve = RESOLVE_NO_MAGICLINKS | (whole_root ? RESOLVE_IN_ROOT : RESOLVE_BENEATH)};
	int fd;
	do
		fd = (int)syscall(SYS_openat2, root, *path ? path : ".", &how, sizeof how);
	while (fd < 0 && errno == EAGAIN); /* somebody renames in the path at this moment */
	if (fd >= 0 || errno != ENOSYS)
		return fd;
	/* Before Linux 5.6: step by step, and no link at all. */
	char *copy = text(path, strlen(path)), *save = NULL;
	fd = dup(root);
	for (char *part = strtok_r(copy, "/", &save); part && fd >= 0; part = strtok_r(NULL, "/", &save)) {
		int next = openat(fd, part, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		int error = errno;
		close(fd);
		errno = error == ENOTDIR ? ELOOP : error;
		fd = next;
	}
	free(copy);
	return fd;
}

static int open_directory(const char *path, const char *name);

/* The directory of the entry, made where missing; *last is the entry's own name. */
static int directory_of(char *path, const char *name, const char **last)
{
	static char *cached;
	static int cached_fd = -1;
	char *slash = strrchr(path, '/');
	*last = slash ? slash + 1 : path;
	if (!slash)
		return root;
	*slash = 0;
	if (!cached || strcmp(cached, path)) {
		if (cached_fd >= 0)
			close(cached_fd);
		cached_fd = open_directory(path, name);
		free(cached);
		cached = text(path, strlen(path));
	}
	*slash = '/';
	return cached_fd;
}

static int open_directory(const char *path, const char *name)
{
	int fd = open_below(path, O_PATH | O_DIRECTORY);
	if (fd >= 0)
		return fd;
	if (errno == EXDEV || errno == ELOOP)
		bad_archive(name, "leads out of the target through a link");
	if (errno != ENOENT)
		die_errno(name);
	char *copy = text(path, strlen(path)), *slash = strrchr(copy, '/');
	int parent = root;
	if (slash) {
		*slash = 0;
		parent = open_directory(copy, name);
	}
	if (mkdirat(parent, slash ? slash + 1 : copy, 0777) && errno != EEXIST)
		die_errno(name);
	if (parent != root)
		close(parent);
	free(copy);
	fd = open_below(path, O_PATH | O_DIRECTORY);
	if (fd < 0)
		bad_archive(name, "leads through a link to nowhere");
	return fd;
}

/* ---- entries ------------------------------------------------------------------------------------------------------------------------- */

/* Runs `make` again after what is in the way was removed. */
#define REPLACING(call, dir, last, name)                                                                                              \
	do {                                                                                                                          \
		if (!(call))                                                                                                          \
			break;                                                                                                        \
		if (errno != EEXIST || (unlinkat(dir, last, 0) && errno != ENOENT) || (call))                                         \
			die_errno(name);                                                                                              \
	} while (0)

static mode_t mode_of(const struct entry *e)
{
	return keep_owners ? e->mode : e->mode & 0777;
}

static void own(int dir, const char *last, const struct entry *e)
{
	if (keep_owners && fchownat(dir, last, e->uid, e->gid, AT_SYMLINK_NOFOLLOW))
		die_errno(e->name);
}

static void stamp(int dir, const char *last, const struct timespec *mtime)
{
	struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, *mtime};
	utimensat(dir, last, times, AT_SYMLINK_NOFOLLOW); /* a clock is not worth failing for */
}

static int open_new(int dir, const char *last)
{
	return openat(dir, last, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
}

/* By the way over /proc: there are no system calls for attributes that take a directory and a name. */
static void put_xattrs(const struct entry *e, int dir, const char *last)
{
	if (!e->xattrs)
		return;
	char path[NAME_MAX + 64];
	text_format(path, sizeof path, "/proc/self/fd/%d/%s", dir, last);
	tar_xattr_put(e->xattrs, path, e->name);
}

static void copy_exactly(int fd, uint64_t size, const char *name)
{
	if (copy_bytes(0, fd, size, name) != size)
		die("short_input", EIO, name, "%s: the archive ends in the middle", name);
}

/* A line with a number of a sparse file's map, which is part of its content, in whole blocks. */
static uint64_t map_number(const struct entry *e, uint64_t *left, size_t *at)
{
	static char block[TAR_BLOCK];
	uint64_t v = 0;
	for (int digits = 0;; digits++) {
		if (*at == sizeof block) {
			if (*left < sizeof block)
				bad_archive(e->name, "a damaged map");
			must_read(block, sizeof block);
			*left -= sizeof block;
			*at = 0;
		}
		char c = block[(*at)++];
		if (c == '\n' && digits)
			return v;
		if (c < '0' || c > '9' || digits > 18)
			bad_archive(e->name, "a damaged map");
		v = v * 10 + (uint64_t)(c - '0');
	}
}

static void copy_sparse(const struct entry *e, int fd)
{
	uint64_t left = e->size, end = 0;
	size_t at = TAR_BLOCK;
	uint64_t count = map_number(e, &left, &at);
	uint64_t *map = count <= SPARSE_MAX ? malloc((size_t)(count * 2 + 1) * sizeof *map) : NULL;
	if (!map)
		bad_archive(e->name, "too many pieces");
	for (uint64_t i = 0; i < 2 * count; i++)
		map[i] = map_number(e, &left, &at);
	for (uint64_t i = 0; i < count; i++) {
		uint64_t offset = map[2 * i], size = map[2 * i + 1];
		if (offset < end || offset > e->real_size || size > e->real_size - offset || size > left)
			bad_archive(e->name, "a damaged map");
		if (size && lseek(fd, (off_t)offset, SEEK_SET) < 0)
			die_errno(e->name);
		copy_exactly(fd, size, e->name);
		left -= size;
		end = offset + size;
	}
	free(map);
	skip(left);
	if (ftruncate(fd, (off_t)e->real_size))
		die_errno(e->name);
}

static void put_file(const struct entry *e, int dir, const char *last)
{
	int fd = open_new(dir, last);
	if (fd < 0 && errno == EEXIST && (unlinkat(dir, last, 0) == 0 || errno == ENOENT))
		fd = open_new(dir, last);
	if (fd < 0)
		die_errno(e->name);
	if (e->sparse)
		copy_sparse(e, fd);
	else
		copy_exactly(fd, e->size, e->name);
	struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, e->mtime};
	if ((keep_owners && fchown(fd, e->uid, e->gid)) || fchmod(fd, mode_of(e)))
		die_errno(e->name);
	put_xattrs(e, dir, last); /* a change of owner takes capabilities away */
	futimens(fd, times);
	close(fd);
	skip(padding(e->size));
}

static void put_directory(struct entry *e, const char *path, int dir, const char *last)
{
	struct stat st;
	bool fresh = *path && mkdirat(dir, last, 0700) == 0;
	if (!fresh && *path) {
		int error = errno;
		int there = error == EEXIST ? open_below(path, O_PATH | O_DIRECTORY) : -1;
		if (there >= 0) {
			close(there);
		} else if (error == EEXIST && fstatat(dir, last, &st, AT_SYMLINK_NOFOLLOW) == 0 && !S_ISDIR(st.st_mode) &&
			   unlinkat(dir, last, 0) == 0 && mkdirat(dir, last, 0700) == 0) {
			fresh = true;
		} else {
			errno = error;
			die_errno(e->name);
		}
	}
	/* What was there already is somebody's: it keeps its mode and owner, unless the archive is to be taken at its word. */
	if (!fresh && !keep_owners)
		return;
	if (*path)
		own(dir, last, e);
	struct later *l = later_count < 100000 ? malloc(sizeof *l + strlen(path) + 1) : NULL;
	if (!l)
		return;
	l->next = later;
	l->mode = mode_of(e);
	l->mtime = e->mtime;
	l->xattrs = e->xattrs;
	e->xattrs = NULL;
	strcpy(l->name, path);
	later = l;
	later_count++;
}

static void finish_directories(void)
{
	for (struct later *l = later; l; l = l->next) { /* the deepest come first: the list is in reverse order */
		int fd = open_below(l->name, O_RDONLY | O_DIRECTORY);
		struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, l->mtime};
		if (fd < 0)
			continue; /* replaced by a later entry */
		if (fchmod(fd, l->mode))
			die_errno(l->name);
		if (l->xattrs) {
			char place[64];
			text_format(place, sizeof place, "/proc/self/fd/%d/.", fd);
			tar_xattr_put(l->xattrs, place, l->name);
		}
		futimens(fd, times);
		close(fd);
	}
}

static void put_hard_link(const struct entry *e, int dir, const char *last)
{
	char *target = relative(e->link);
	const char *name;
	char *slash = strrchr(target, '/');
	int from = root;
	name = slash ? slash + 1 : target;
	if (slash) {
		*slash = 0;
		from = open_below(target, O_PATH | O_DIRECTORY);
		if (from < 0)
			bad_archive(e->name, "a hard link to what is not in the target");
	}
	struct stat a, b;
	/* To itself: an archive may name a file twice. */
	if (fstatat(from, name, &a, AT_SYMLINK_NOFOLLOW) == 0 && fstatat(dir, last, &b, AT_SYMLINK_NOFOLLOW) == 0 && a.st_dev == b.st_dev &&
	    a.st_ino == b.st_ino)
		return;
	REPLACING(linkat(from, name, dir, last, 0), dir, last, e->name);
	if (from != root)
		close(from);
	free(target);
}

static void put_special(const struct entry *e, int dir, const char *last)
{
	mode_t kind = e->type == '6' ? S_IFIFO : e->type == '3' ? S_IFCHR : S_IFBLK;
	if (kind != S_IFIFO && !keep_owners)
		bad_archive(e->name, "device nodes are only unpacked with `preserve`");
	REPLACING(mknodat(dir, last, kind | 0600, makedev(e->major, e->minor)), dir, last, e->name);
	own(dir, last, e);
	fchmodat(dir, last, mode_of(e), 0);
	put_xattrs(e, dir, last);
	stamp(dir, last, &e->mtime);
}

static void put_entry(struct entry *e)
{
	char *path = relative(e->name);
	const char *last;
	int dir = directory_of(path, e->name, &last);
	bool file = e->type == '0' || e->type == 0 || e->type == '7';
	size_t n = strlen(e->name);
	if (file && n && e->name[n - 1] == '/')
		file = false; /* before POSIX, directories were files with a slash */
	if (!*path && (file || e->type != '5'))
		bad_archive(e->name, "an entry without a name");
	if (file) {
		put_file(e, dir, last);
	} else if (e->type == '5' || e->type == '0' || e->type == 0) {
		put_directory(e, path, dir, last);
		skip(e->size + padding(e->size));
	} else if (e->type == '1') {
		put_hard_link(e, dir, last);
	} else if (e->type == '2') {
		if (!*e->link)
			bad_archive(e->name, "a link without a target");
		REPLACING(symlinkat(e->link, dir, last), dir, last, e->name);
		own(dir, last, e);
		put_xattrs(e, dir, last);
		stamp(dir, last, &e->mtime);
	} else if (e->type == '3' || e->type == '4' || e->type == '6') {
		put_special(e, dir, last);
	} else {
		bad_archive(e->name, "a kind of entry that is not supported");
	}
	free(path);
}

void tar_read_tree(const char *target, bool preserve)
{
	struct entry e;
	root = open(*target ? target : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		die_errno(target);
	keep_owners = preserve;
	whole_root = !strcmp(target, "/") || !*target;
	while (next_entry(&e)) {
		put_entry(&e);
		free(e.name);
		free(e.link);
		tar_xattr_free(e.xattrs);
	}
	finish_directories();
	/* The second zero block and whatever pads the last record: a writer that is not read to the end would fail. */
	char rest[4096];
	while (read(0, rest, sizeof rest) > 0)
		;
}

void applet_tar_in(void)
{
	char *path = path_argument("path", false);
	bool preserve = mp_bool_or(&applet_args, "preserve", false);
	if (preserve && geteuid() != 0)
		die(NULL, EPERM, path, "only root can preserve owners");
	if (mp_bool_or(&applet_args, "parents", true))
		make_directories(path, 0777);
	tar_read_tree(path, preserve);
}
