/* The applets' front door, what they share, and the small ones. */
#define _GNU_SOURCE
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct mp applet_args;
static const struct account *self;
static const char *bad_directory; /* the working directory that could not be entered, or NULL */
static int bad_directory_error;

/* ---- errors --------------------------------------------------------------------------------------------------------------------- */

static const char *code_of(int error)
{
	switch (error) {
	case ENOENT: return "file_not_found";
	case EEXIST: return "file_exists";
	case EISDIR: return "is_directory";
	case ENOTDIR: return "not_directory";
	case ENOTEMPTY: return "directory_not_empty";
	case EACCES: case EPERM: return "permission_denied";
	case EROFS: return "read_only";
	case ENOSPC: case EDQUOT: case EFBIG: return "no_space";
	case ELOOP: case ENAMETOOLONG: return "bad_path";
	default: return "io";
	}
}

void die(const char *code, int error, const char *path, const char *format, ...)
{
	char text[PATH_ROOM + 256];
	static uint8_t buffer[2 * PATH_ROOM + 1024];
	struct mp_writer w;
	va_list args;
	va_start(args, format);
	text_formatv(text, sizeof text, format, args);
	va_end(args);
	out_flush();
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, path ? 4 : 3);
	mpw_key_str(&w, "code", code ? code : code_of(error));
	mpw_str(&w, "message");
	mpw_clean(&w, text);
	mpw_key_uint(&w, "errno", (uint64_t)error);
	if (path) {
		mpw_str(&w, "path");
		mpw_bin(&w, path, strlen(path));
	}
	_exit(write(2, buffer, w.length) < 0 ? 2 : 1);
}

void die_errno(const char *path)
{
	int error = errno;
	die(NULL, error, path, "%s: %s", path, strerror(error));
}

void die_request(const char *what)
{
	die("bad_request", EINVAL, NULL, "%s", what);
}

/* ---- output --------------------------------------------------------------------------------------------------------------------- */

static uint8_t out_buffer[65536];
static size_t out_used;

static void write_all(int fd, const void *data, size_t n)
{
	const uint8_t *p = data;
	while (n) {
		ssize_t w = write(fd, p, n);
		if (w < 0 && errno != EINTR)
			_exit(1); /* nobody reads */
		if (w > 0) {
			p += w;
			n -= (size_t)w;
		}
	}
}

void out_flush(void)
{
	size_t n = out_used;
	out_used = 0;
	write_all(1, out_buffer, n);
}

void out_bytes(const void *data, size_t n)
{
	if (n > sizeof out_buffer - out_used)
		out_flush();
	if (n > sizeof out_buffer) {
		write_all(1, data, n);
		return;
	}
	memcpy(out_buffer + out_used, data, n);
	out_used += n;
}

void out_record(const struct mp_writer *w)
{
	uint8_t length[4];
	put_u32(length, (uint32_t)w->length);
	out_bytes(length, 4);
	out_bytes(w->data, w->length);
}

static const char *type_name(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG: return "file";
	case S_IFDIR: return "directory";
	case S_IFLNK: return "symlink";
	case S_IFIFO: return "fifo";
	case S_IFSOCK: return "socket";
	case S_IFCHR: return "character";
	case S_IFBLK: return "block";
	default: return "unknown";
	}
}

static void put_path(struct mp_writer *w, const char *key, const char *path)
{
	mpw_str(w, key);
	mpw_bin(w, path, strlen(path));
}

static void put_time(struct mp_writer *w, const char *key, const struct timespec *t)
{
	mpw_str(w, key);
	mpw_int(w, (int64_t)t->tv_sec * 1000000000 + t->tv_nsec);
}

void out_entry(int dir, const char *name, const char *path, const struct stat *st)
{
	static uint8_t buffer[3 * PATH_ROOM + 1024];
	char target[PATH_ROOM];
	ssize_t n = S_ISLNK(st->st_mode) ? readlinkat(dir, name, target, sizeof target - 1) : -1;
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, n >= 0 ? 15 : 14);
	put_path(&w, "path", path);
	put_path(&w, "name", path_name(path));
	mpw_key_str(&w, "type", type_name(st->st_mode));
	mpw_key_uint(&w, "size", (uint64_t)st->st_size);
	mpw_key_uint(&w, "mode", st->st_mode & 07777);
	mpw_key_uint(&w, "uid", st->st_uid);
	mpw_key_uint(&w, "gid", st->st_gid);
	mpw_key_uint(&w, "nlink", st->st_nlink);
	mpw_key_uint(&w, "ino", st->st_ino);
	mpw_key_uint(&w, "dev", st->st_dev);
	put_time(&w, "mtime", &st->st_mtim);
	put_time(&w, "ctime", &st->st_ctim);
	mpw_str(&w, "user");
	mpw_clean(&w, account_name(st->st_uid, false));
	mpw_str(&w, "group");
	mpw_clean(&w, account_name(st->st_gid, true));
	if (n >= 0) {
		target[n] = 0;
		put_path(&w, "target", target);
	}
	out_record(&w);
}

void out_entry_of(const char *path, bool follow)
{
	struct stat st;
	if (fstatat(AT_FDCWD, path, &st, follow ? 0 : AT_SYMLINK_NOFOLLOW))
		die_errno(path);
	out_entry(AT_FDCWD, path, path, &st);
}

/* ---- paths ------------------------------------------------------------------------------------------------------------------------ */

static void bad_path(const char *text, const char *why)
{
	die("bad_path", ENAMETOOLONG, NULL, "%s: %s", text, why);
}

static char *clean(const char *path)
{
	char *out = strdup(path), *to = out;
	if (!out)
		die(NULL, ENOMEM, NULL, "out of memory");
	for (const char *at = path; *at;) {
		size_t n;
		at += strspn(at, "/");
		n = strcspn(at, "/");
		if (n && !(n == 1 && *at == '.')) {
			*to++ = '/';
			memmove(to, at, n);
			to += n;
		}
		at += n;
	}
	if (to == out)
		*to++ = '/';
	*to = 0;
	return out;
}

char *path_join(const char *directory, const char *name)
{
	size_t n = strlen(directory), m = strlen(name);
	char *out = malloc(n + m + 2);
	if (!out)
		die(NULL, ENOMEM, NULL, "out of memory");
	memcpy(out, directory, n);
	if (n && directory[n - 1] != '/')
		out[n++] = '/';
	memcpy(out + n, name, m + 1);
	return out;
}

const char *path_name(const char *path)
{
	const char *slash = strrchr(path, '/');
	return slash && slash[1] ? slash + 1 : path;
}

bool home_of(const char *user, char *home, size_t size)
{
	return *user ? account_home(user, home, size) : text_format(home, size, "%s", self->home) < size;
}

char *path_argument(const char *key, bool optional)
{
	char text[PATH_ROOM], home[PATH_ROOM];
	struct mp v = mp_get(&applet_args, key);
	if (optional && (v.type == MP_MISSING || v.type == MP_NIL))
		return NULL;
	if (!mp_is_text(&v) || !v.count)
		die("bad_request", EINVAL, NULL, "%s: a path is needed", key);
	if (!mp_copy(&v, text, sizeof text))
		die("bad_path", ENAMETOOLONG, NULL, "%s: too long, or with a NUL inside", key);
	if (text[0] == '~') {
		char *rest = strchr(text, '/');
		if (rest)
			*rest = 0;
		if (!home_of(text + 1, home, sizeof home))
			bad_path(text, "no such user");
		return clean(path_join(home, rest ? rest + 1 : ""));
	}
	if (text[0] == '/')
		return clean(text);
	if (bad_directory)
		die(NULL, bad_directory_error, bad_directory, "%s: %s", bad_directory, strerror(bad_directory_error));
	if (!getcwd(home, sizeof home))
		die_errno(text);
	char *path = clean(path_join(home, text));
	if (strlen(path) >= PATH_ROOM)
		bad_path(text, "too long");
	return path;
}

void make_directories(const char *path, mode_t mode)
{
	struct stat st;
	if (mkdir(path, mode) == 0)
		return;
	if (errno == ENOENT) {
		char *parent = strdup(path), *slash = parent ? strrchr(parent, '/') : NULL;
		if (slash && slash != parent) {
			*slash = 0;
			make_directories(parent, 0777);
			free(parent);
			if (mkdir(path, mode) == 0)
				return;
		}
	}
	int error = errno;
	if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
		return;
	errno = error == EEXIST ? ENOTDIR : error;
	die_errno(path);
}

int open_parent(const char *path, const char **name, bool make)
{
	char *parent = strdup(path), *slash = parent ? strrchr(parent, '/') : NULL;
	if (!slash || !slash[1])
		die(NULL, EISDIR, path, "%s: is a directory", path);
	*name = path + (slash - parent) + 1;
	slash[slash == parent] = 0;
	int dir = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0 && errno == ENOENT && make) {
		make_directories(parent, 0777);
		dir = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
	}
	if (dir < 0)
		die_errno(parent);
	free(parent);
	return dir;
}

/* ---- trees ------------------------------------------------------------------------------------------------------------------------ */

static int by_bytes(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

char **directory_names(int dir, size_t most, size_t *count, bool *more)
{
	DIR *d = fdopendir(dup(dir));
	size_t room = 0;
	char **names = NULL;
	*count = 0;
	*more = false;
	if (!d)
		return NULL;
	for (struct dirent *e; (e = readdir(d));) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		if (*count == most) {
			*more = true;
			break;
		}
		if (*count == room) {
			room = room ? 2 * room : 64;
			names = realloc(names, room * sizeof *names);
		}
		if (!names || !(names[*count] = strdup(e->d_name)))
			die(NULL, ENOMEM, NULL, "out of memory");
		(*count)++;
	}
	closedir(d);
	if (*count)
		qsort(names, *count, sizeof *names, by_bytes);
	return names;
}

void remove_entry(int dir, const char *name, const char *path, bool recursive, dev_t device, int depth)
{
	struct stat st;
	if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
		die_errno(path);
	if (!S_ISDIR(st.st_mode)) {
		if (unlinkat(dir, name, 0) && errno != ENOENT)
			die_errno(path);
		return;
	}
	if (recursive) {
		if (depth == TREE_DEPTH)
			die("too_many", ELOOP, path, "%s: more than %d directories deep", path, TREE_DEPTH);
		if (st.st_dev != device)
			die(NULL, EBUSY, path, "%s: another file system is mounted here", path);
		int sub = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		bool more = true;
		if (sub < 0)
			die_errno(path);
		while (more) { /* in portions: a directory may have more names than there is memory */
			size_t n;
			char **names = directory_names(sub, 4096, &n, &more);
			for (size_t i = 0; i < n; i++) {
				char *below = path_join(path, names[i]);
				remove_entry(sub, names[i], below, true, device, depth + 1);
				free(below);
				free(names[i]);
			}
			free(names);
		}
		close(sub);
	}
	if (unlinkat(dir, name, AT_REMOVEDIR))
		die_errno(path);
}

void remove_path(const char *path, bool recursive, bool missing_ok)
{
	struct stat st;
	const char *name;
	int dir = open_parent(path, &name, false);
	if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW)) {
		if (errno == ENOENT && missing_ok)
			return;
		die_errno(path);
	}
	remove_entry(dir, name, path, recursive, st.st_dev, 0);
}

/* Calls `change` for the path and, if wanted, for everything below it; links are passed on as they are. */
static void for_tree(int dir, const char *name, const char *path, bool recursive, int depth,
		     void (*change)(int dir, const char *name, const char *path, const struct stat *st))
{
	struct stat st;
	if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW)) {
		if (errno == ENOENT && depth)
			return; /* it went meanwhile */
		die_errno(path);
	}
	if (recursive && S_ISDIR(st.st_mode)) {
		if (depth == TREE_DEPTH)
			die("too_many", ELOOP, path, "%s: more than %d directories deep", path, TREE_DEPTH);
		int sub = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		size_t n;
		bool more;
		if (sub < 0)
			die_errno(path);
		char **names = directory_names(sub, SIZE_MAX, &n, &more);
		for (size_t i = 0; i < n; i++) {
			char *below = path_join(path, names[i]);
			for_tree(sub, names[i], below, true, depth + 1, change);
			free(below);
			free(names[i]);
		}
		free(names);
		close(sub);
	}
	change(dir, name, path, &st);
}

/* ---- small applets ---------------------------------------------------------------------------------------------------------------- */

static void applet_stat(void)
{
	out_entry_of(path_argument("path", false), mp_bool_or(&applet_args, "follow", true));
}

static void applet_mkdir(void)
{
	char *path = path_argument("path", false);
	struct mp m = mp_get(&applet_args, "mode");
	mode_t mode = m.type == MP_UINT ? (mode_t)(m.u & 07777) : 0777;
	if (mp_bool_or(&applet_args, "parents", true)) {
		struct stat st;
		bool there = stat(path, &st) == 0;
		make_directories(path, mode);
		/* Exactly the mode that was asked for, whatever the mask; what was there before keeps its own. */
		if (!there && m.type == MP_UINT && chmod(path, mode))
			die_errno(path);
	} else if (mkdir(path, mode) || (m.type == MP_UINT && chmod(path, mode))) {
		die_errno(path);
	}
	out_entry_of(path, true);
}

static void applet_remove(void)
{
	remove_path(path_argument("path", false), mp_bool_or(&applet_args, "recursive", false), mp_bool_or(&applet_args, "missing_ok", false));
}

static uint64_t wanted_mode;
static uid_t wanted_uid;
static gid_t wanted_gid;

static void change_mode(int dir, const char *name, const char *path, const struct stat *st)
{
	char proc[32];
	if (S_ISLNK(st->st_mode))
		return;
	/* By descriptor: the name may be replaced by a link between looking and changing. */
	int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	text_format(proc, sizeof proc, "/proc/self/fd/%d", fd);
	if (fd < 0 || chmod(proc, (mode_t)wanted_mode))
		die_errno(path);
	close(fd);
}

static void change_owner(int dir, const char *name, const char *path, const struct stat *st)
{
	(void)st;
	if (fchownat(dir, name, wanted_uid, wanted_gid, AT_SYMLINK_NOFOLLOW))
		die_errno(path);
}

static char *resolved(const char *path)
{
	char proc[32], target[PATH_ROOM];
	int fd = open(path, O_PATH | O_CLOEXEC);
	if (fd < 0)
		die_errno(path);
	text_format(proc, sizeof proc, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(proc, target, sizeof target - 1);
	if (n < 0)
		die_errno(path);
	target[n] = 0;
	close(fd);
	return strdup(target);
}

static void applet_chmod(void)
{
	char *path = path_argument("path", false);
	struct mp m = mp_get(&applet_args, "mode");
	if (m.type != MP_UINT || m.u > 07777)
		die_request("mode: from 0 to 07777");
	wanted_mode = m.u;
	for_tree(AT_FDCWD, resolved(path), path, mp_bool_or(&applet_args, "recursive", false), 0, change_mode);
	out_entry_of(path, true);
}

static void applet_chown(void)
{
	char *path = path_argument("path", false), spec[2 * NAME_ROOM];
	struct mp owner = mp_get(&applet_args, "owner");
	struct account a;
	if (!mp_copy(&owner, spec, sizeof spec) || !*spec)
		die_request("owner: user, user:group or :group");
	/* Without a colon the group stays, as chown(1) has it. */
	const char *code = account_resolve(spec, &a);
	if (code)
		die(code, ENOENT, NULL, "no user or group %s in the guest", spec);
	wanted_uid = *spec == ':' ? (uid_t)-1 : a.uid;
	wanted_gid = strchr(spec, ':') ? a.gid : (gid_t)-1;
	bool follow = mp_bool_or(&applet_args, "follow", false);
	for_tree(AT_FDCWD, follow ? resolved(path) : path, path, mp_bool_or(&applet_args, "recursive", false), 0, change_owner);
	out_entry_of(path, follow);
}

const char *text_temporary(void)
{
	static char name[40];
	static unsigned count;
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	text_format(name, sizeof name, ".stoker-%d-%u-%lx", getpid(), count++, (unsigned long)t.tv_nsec);
	return name;
}

static void applet_symlink(void)
{
	char *path = path_argument("path", false), target[PATH_ROOM];
	struct mp t = mp_get(&applet_args, "target");
	const char *name;
	if (!mp_copy(&t, target, sizeof target) || !*target)
		die_request("target: text");
	int dir = open_parent(path, &name, false);
	if (symlinkat(target, dir, name)) {
		if (errno != EEXIST || !mp_bool_or(&applet_args, "overwrite", false))
			die_errno(path);
		const char *temporary = text_temporary();
		if (symlinkat(target, dir, temporary))
			die_errno(path);
		if (renameat(dir, temporary, dir, name)) {
			int error = errno;
			unlinkat(dir, temporary, 0);
			errno = error;
			die_errno(path);
		}
	}
	out_entry_of(path, false);
}

static void applet_readlink(void)
{
	char *path = path_argument("path", false), target[PATH_ROOM];
	if (mp_bool_or(&applet_args, "canonical", false)) {
		char *full = resolved(path);
		out_bytes(full, strlen(full));
		return;
	}
	ssize_t n = readlink(path, target, sizeof target);
	if (n < 0)
		die_errno(path);
	out_bytes(target, (size_t)n);
}

/* Another file system: everything goes through a pipe as an archive, from a child that reads to us who write. */
static void move_across(const char *source, const char *destination)
{
	const char *name;
	struct stat from, to;
	int fds[2], status;
	bool exists = lstat(destination, &to) == 0;
	if (lstat(source, &from))
		die_errno(source);
	errno = S_ISDIR(to.st_mode) ? EISDIR : ENOTDIR;
	if (exists && S_ISDIR(from.st_mode) != S_ISDIR(to.st_mode))
		die_errno(destination);
	if (exists && S_ISDIR(to.st_mode) && rmdir(destination))
		die_errno(destination);
	close(open_parent(destination, &name, false));
	if (pipe(fds))
		die_errno(source);
	pid_t pid = fork();
	if (pid == 0) {
		dup2(fds[1], 1);
		close(fds[0]);
		close(fds[1]);
		tar_write_tree(source, name, UINT64_MAX);
		out_flush();
		_exit(0);
	}
	dup2(fds[0], 0);
	close(fds[0]);
	close(fds[1]);
	char *parent = strdup(destination);
	parent[name - destination - (name - destination > 1)] = 0;
	tar_read_tree(parent, geteuid() == 0);
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		_exit(1); /* the child has said why */
	remove_path(source, true, false);
}

static void applet_move(void)
{
	char *source = path_argument("source", false), *destination = path_argument("destination", false);
	const char *from, *to;
	bool overwrite = mp_bool_or(&applet_args, "overwrite", true);
	int a = open_parent(source, &from, false), b = open_parent(destination, &to, mp_bool_or(&applet_args, "parents", false));
	struct stat st;
	if (!overwrite && fstatat(b, to, &st, AT_SYMLINK_NOFOLLOW) == 0) {
		errno = EEXIST;
		die_errno(destination);
	}
	long failed = overwrite ? renameat(a, from, b, to) : syscall(SYS_renameat2, a, from, b, to, RENAME_NOREPLACE);
	if (failed && !overwrite && errno == EINVAL)
		failed = renameat(a, from, b, to);
	if (failed && errno == EXDEV) {
		move_across(source, destination);
	} else if (failed) {
		int error = errno;
		bool missing = fstatat(a, from, &st, AT_SYMLINK_NOFOLLOW) != 0;
		errno = error;
		die_errno(missing ? source : destination);
	}
	out_entry_of(destination, false);
}

/* ---- the front door ----------------------------------------------------------------------------------------------------------------- */

int applet_main(char **argv, const struct mp *args, const char *directory, int error, const struct account *a)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} applets[] = {
		{"stat", applet_stat},       {"list", applet_list},     {"read", applet_read},         {"write", applet_write},
		{"mkdir", applet_mkdir},     {"remove", applet_remove}, {"move", applet_move},         {"chmod", applet_chmod},
		{"chown", applet_chown},     {"symlink", applet_symlink}, {"readlink", applet_readlink}, {"watch", applet_watch},
		{"tar-out", applet_tar_out}, {"tar-in", applet_tar_in}, {"sftp", applet_sftp},
	};
	applet_args = *args;
	self = a;
	bad_directory = directory;
	bad_directory_error = error;
	for (size_t i = 0; i < sizeof applets / sizeof *applets; i++)
		if (!strcmp(argv[0], applets[i].name)) {
			applets[i].run();
			out_flush();
			return 0;
		}
	die("unsupported", ENOSYS, NULL, "no applet is called %s", argv[0]);
}
