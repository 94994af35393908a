/* The applet `sftp`: the file transfer protocol of ssh, version 3, on stdin and stdout, as OpenSSH's server speaks it. So sftp, scp
 * and sshfs work in every guest, whatever its image has in it.
 *
 * What comes in is hostile: every length is checked against the packet, a packet against its bound. Memory is two buffers. */
#define _GNU_SOURCE
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
	FXP_INIT = 1, FXP_VERSION, FXP_OPEN, FXP_CLOSE, FXP_READ, FXP_WRITE, FXP_LSTAT, FXP_FSTAT, FXP_SETSTAT, FXP_FSETSTAT, FXP_OPENDIR,
	FXP_READDIR, FXP_REMOVE, FXP_MKDIR, FXP_RMDIR, FXP_REALPATH, FXP_STAT, FXP_RENAME, FXP_READLINK, FXP_SYMLINK,
	FXP_STATUS = 101, FXP_HANDLE, FXP_DATA, FXP_NAME, FXP_ATTRS, FXP_EXTENDED = 200, FXP_EXTENDED_REPLY,
};
enum { FX_OK, FX_EOF, FX_NO_SUCH_FILE, FX_PERMISSION_DENIED, FX_FAILURE, FX_BAD_MESSAGE, FX_UNSUPPORTED = 8 };
enum { FXF_READ = 1, FXF_WRITE = 2, FXF_APPEND = 4, FXF_CREATE = 8, FXF_TRUNCATE = 16, FXF_EXCLUSIVE = 32 };
enum { ATTR_SIZE = 1, ATTR_OWNER = 2, ATTR_MODE = 4, ATTR_TIMES = 8, ATTR_EXTENDED = 0x80000000u };
enum { PACKET = 256 << 10, DATA = PACKET - 1024, HANDLES = 256, NAMES = 64 };

struct attributes {
	uint32_t flags, uid, gid, mode, atime, mtime;
	uint64_t size;
};

static struct handle {
	int fd;
	DIR *dir;
	bool used, append;
} handles[HANDLES];

/* ---- what came ------------------------------------------------------------------------------------------------------------------- */

static const uint8_t *in;
static size_t in_left;
static bool damaged; /* the packet ended before what it should have had */

static const uint8_t *take(size_t n)
{
	static const uint8_t nothing[8];
	const uint8_t *at = in;
	if (damaged || n > in_left) {
		damaged = true;
		return n <= sizeof nothing ? nothing : NULL;
	}
	in += n;
	in_left -= n;
	return at;
}

static uint32_t get32(void)
{
	const uint8_t *p = take(4);
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static uint64_t get64(void)
{
	uint64_t high = get32();
	return high << 32 | get32();
}

static const uint8_t *get_bytes(size_t *n)
{
	*n = get32();
	const uint8_t *p = take(*n);
	if (damaged)
		*n = 0;
	return p;
}

/* A path into a buffer; false (and errno) when it is none. */
static bool get_path(char path[PATH_ROOM])
{
	size_t n;
	const uint8_t *p = get_bytes(&n);
	strcpy(path, ".");
	if (damaged || n >= PATH_ROOM || memchr(p, 0, n)) {
		errno = n >= PATH_ROOM ? ENAMETOOLONG : EINVAL;
		return false;
	}
	if (n) {
		memcpy(path, p, n);
		path[n] = 0;
	}
	return true;
}

static bool get_word(const char *word)
{
	size_t n = strlen(word);
	return in_left >= n + 4 && !memcmp(in + 4, word, n) && in[3] == n && !in[0] && !in[1] && !in[2];
}

static void get_attributes(struct attributes *a)
{
	memset(a, 0, sizeof *a);
	a->flags = get32();
	if (a->flags & ATTR_SIZE)
		a->size = get64();
	if (a->flags & ATTR_OWNER) {
		a->uid = get32();
		a->gid = get32();
	}
	if (a->flags & ATTR_MODE)
		a->mode = get32() & 07777;
	if (a->flags & ATTR_TIMES) {
		a->atime = get32();
		a->mtime = get32();
	}
	if (a->flags & ATTR_EXTENDED)
		for (uint32_t count = get32(); count && !damaged; count--) {
			size_t n;
			get_bytes(&n);
			get_bytes(&n);
		}
}

static struct handle *get_handle(void)
{
	size_t n;
	const uint8_t *p = get_bytes(&n);
	errno = EBADF;
	return n == 1 && handles[*p].used ? &handles[*p] : NULL;
}

static struct handle *get_file(void)
{
	struct handle *h = get_handle();
	return h && !h->dir ? h : NULL;
}

/* ---- the answer ------------------------------------------------------------------------------------------------------------------ */

static uint8_t *answer; /* PACKET bytes and room for the length */
static size_t used;

static void put8(uint8_t v)
{
	answer[used++] = v;
}

static void put32(uint32_t v)
{
	put8((uint8_t)(v >> 24));
	put8((uint8_t)(v >> 16));
	put8((uint8_t)(v >> 8));
	put8((uint8_t)v);
}

static void put64(uint64_t v)
{
	put32((uint32_t)(v >> 32));
	put32((uint32_t)v);
}

static void put_bytes(const void *data, size_t n)
{
	put32((uint32_t)n);
	memcpy(answer + used, data, n);
	used += n;
}

static void put_text(const char *s)
{
	put_bytes(s, strlen(s));
}

static void begin(uint8_t type, uint32_t id)
{
	used = 4;
	put8(type);
	put32(id);
}

static void put_attributes(const struct stat *st)
{
	put32(ATTR_SIZE | ATTR_OWNER | ATTR_MODE | ATTR_TIMES);
	put64((uint64_t)st->st_size);
	put32(st->st_uid);
	put32(st->st_gid);
	put32(st->st_mode);
	put32((uint32_t)st->st_atime);
	put32((uint32_t)st->st_mtime);
}

static void status(uint32_t id, uint32_t code, const char *text)
{
	begin(FXP_STATUS, id);
	put32(code);
	put_text(text);
	put_text("");
}

static void failed(uint32_t id)
{
	int error = errno;
	uint32_t code = FX_FAILURE;
	if (error == ENOENT || error == ENOTDIR || error == ELOOP)
		code = FX_NO_SUCH_FILE;
	else if (error == EACCES || error == EPERM || error == EROFS)
		code = FX_PERMISSION_DENIED;
	else if (error == EINVAL || error == EBADF || error == ENAMETOOLONG)
		code = FX_BAD_MESSAGE;
	else if (error == ENOSYS || error == EOPNOTSUPP)
		code = FX_UNSUPPORTED;
	status(id, code, strerror(error));
}

static void done(uint32_t id, bool ok)
{
	if (ok)
		status(id, FX_OK, "");
	else
		failed(id);
}

static void stated(uint32_t id, int result, const struct stat *st)
{
	if (result) {
		failed(id);
		return;
	}
	begin(FXP_ATTRS, id);
	put_attributes(st);
}

static void named(uint32_t id, const char *name)
{
	begin(FXP_NAME, id);
	put32(1);
	put_text(name);
	put_text(name);
	put32(0);
}

/* ---- files ----------------------------------------------------------------------------------------------------------------------- */

static void give_handle(uint32_t id, int fd, DIR *dir, bool append)
{
	for (unsigned i = 0; i < HANDLES; i++)
		if (!handles[i].used) {
			uint8_t number = (uint8_t)i;
			handles[i] = (struct handle){fd, dir, true, append};
			begin(FXP_HANDLE, id);
			put_bytes(&number, 1);
			return;
		}
	if (dir)
		closedir(dir);
	else
		close(fd);
	status(id, FX_FAILURE, "too many open files");
}

static void open_file(uint32_t id)
{
	char path[PATH_ROOM];
	struct attributes a;
	bool good = get_path(path);
	uint32_t wanted = get32();
	get_attributes(&a);
	if (!good || damaged) {
		failed(id);
		return;
	}
	int flags = wanted & FXF_WRITE ? wanted & FXF_READ ? O_RDWR : O_WRONLY : O_RDONLY;
	flags |= (wanted & FXF_APPEND ? O_APPEND : 0) | (wanted & FXF_CREATE ? O_CREAT : 0) | (wanted & FXF_TRUNCATE ? O_TRUNC : 0) |
		 (wanted & FXF_EXCLUSIVE ? O_EXCL : 0);
	int fd = open(path, flags | O_CLOEXEC | O_NOCTTY, a.flags & ATTR_MODE ? a.mode & 0777 : 0666);
	if (fd < 0)
		failed(id);
	else
		give_handle(id, fd, NULL, (wanted & FXF_APPEND) != 0);
}

static void read_file(uint32_t id)
{
	struct handle *h = get_file();
	off_t offset = (off_t)get64();
	size_t most = get32();
	if (!h || damaged) {
		failed(id);
		return;
	}
	begin(FXP_DATA, id);
	put32(0);
	if (most > DATA)
		most = DATA;
	ssize_t n = pread(h->fd, answer + used, most, offset);
	if (n < 0 && errno == ESPIPE)
		n = read(h->fd, answer + used, most);
	if (n < 0) {
		failed(id);
	} else if (!n) {
		status(id, FX_EOF, "");
	} else {
		used -= 4;
		put32((uint32_t)n);
		used += (size_t)n;
	}
}

static void write_file(uint32_t id)
{
	struct handle *h = get_file();
	off_t offset = (off_t)get64();
	size_t n;
	const uint8_t *data = get_bytes(&n);
	bool ok = h && !damaged;
	while (ok && n) {
		ssize_t w = h->append ? write(h->fd, data, n) : pwrite(h->fd, data, n, offset);
		if (w < 0 && errno == ESPIPE)
			w = write(h->fd, data, n);
		if (w < 0 && errno == EINTR)
			continue;
		ok = w > 0;
		if (ok) {
			data += w;
			offset += w;
			n -= (size_t)w;
		}
	}
	done(id, ok);
}

static void close_handle(uint32_t id)
{
	struct handle *h = get_handle();
	bool ok = h && (h->dir ? closedir(h->dir) : close(h->fd)) == 0;
	if (h)
		h->used = false;
	done(id, ok);
}

/* ---- attributes ------------------------------------------------------------------------------------------------------------------ */

/* Of an open file (path NULL), or of a path; `nofollow` of a link itself. */
static bool change(int fd, const char *path, const struct attributes *a, bool nofollow)
{
	int flag = nofollow ? AT_SYMLINK_NOFOLLOW : 0;
	struct timespec times[2] = {{a->atime, 0}, {a->mtime, 0}};
	if (a->flags & ATTR_SIZE && (path ? nofollow ? -1 : truncate(path, (off_t)a->size) : ftruncate(fd, (off_t)a->size)))
		return false;
	if (a->flags & ATTR_MODE && (path ? fchmodat(AT_FDCWD, path, a->mode, flag) : fchmod(fd, a->mode)))
		return false;
	if (a->flags & ATTR_OWNER && (path ? fchownat(AT_FDCWD, path, a->uid, a->gid, flag) : fchown(fd, a->uid, a->gid)))
		return false;
	return !(a->flags & ATTR_TIMES) || (path ? utimensat(AT_FDCWD, path, times, flag) : futimens(fd, times)) == 0;
}

static void set_path(uint32_t id, bool nofollow)
{
	char path[PATH_ROOM];
	struct attributes a;
	bool ok = get_path(path);
	get_attributes(&a);
	errno = EINVAL;
	done(id, ok && !damaged && change(-1, path, &a, nofollow));
}

static void set_file(uint32_t id)
{
	struct handle *h = get_file();
	struct attributes a;
	get_attributes(&a);
	done(id, h && !damaged && change(h->fd, NULL, &a, false));
}

static void stat_path(uint32_t id, int flag)
{
	char path[PATH_ROOM];
	struct stat st;
	stated(id, get_path(path) ? fstatat(AT_FDCWD, path, &st, flag) : -1, &st);
}

static void stat_file(uint32_t id)
{
	struct handle *h = get_handle();
	struct stat st;
	stated(id, h ? fstat(h->dir ? dirfd(h->dir) : h->fd, &st) : -1, &st);
}

/* ---- directories ----------------------------------------------------------------------------------------------------------------- */

static void open_directory(uint32_t id)
{
	char path[PATH_ROOM];
	DIR *dir = get_path(path) ? opendir(path) : NULL;
	if (dir)
		give_handle(id, -1, dir, false);
	else
		failed(id);
}

static size_t padded(char *line, size_t room, const char *text, size_t width, bool right)
{
	size_t n = strlen(text), blanks = n < width ? width - n : 0;
	return text_format(line, room, "%.*s%s%.*s ", right ? (int)blanks : 0, "               ", text, right ? 0 : (int)blanks, "               ");
}

/* What `ls -l` writes: clients show it to people. */
static void put_line(const char *name, const struct stat *st)
{
	static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	char line[512 + 256], number[24];
	size_t at = 0;
	struct tm tm = {0};
	mode_t m = st->st_mode;
	time_t now = time(NULL);
	char kind = S_ISDIR(m) ? 'd' : S_ISLNK(m) ? 'l' : S_ISCHR(m) ? 'c' : S_ISBLK(m) ? 'b' : S_ISFIFO(m) ? 'p' : S_ISSOCK(m) ? 's' : '-';
	line[at++] = kind;
	for (int shift = 6; shift >= 0; shift -= 3) {
		bool special = (m & (shift == 6 ? 04000u : shift == 3 ? 02000u : 01000u)) != 0, runs = (m >> shift & 1) != 0;
		line[at++] = m >> shift & 4 ? 'r' : '-';
		line[at++] = m >> shift & 2 ? 'w' : '-';
		line[at++] = special ? (shift ? runs ? 's' : 'S' : runs ? 't' : 'T') : runs ? 'x' : '-';
	}
	at += text_format(line + at, sizeof line - at, " %4lu ", (unsigned long)st->st_nlink);
	for (int group = 0; group < 2; group++) {
		const char *text = account_name(group ? st->st_gid : st->st_uid, group);
		if (!*text) {
			text_format(number, sizeof number, "%u", group ? st->st_gid : st->st_uid);
			text = number;
		}
		at += padded(line + at, sizeof line - at, text, 8, false);
	}
	text_format(number, sizeof number, "%lu", (unsigned long)st->st_size);
	at += padded(line + at, sizeof line - at, number, 8, true);
	gmtime_r(&st->st_mtime, &tm);
	at += text_format(line + at, sizeof line - at, "%.*s %2d ", 3, months + 3 * (tm.tm_mon % 12), tm.tm_mday);
	if (st->st_mtime > now || now - st->st_mtime > 182 * 86400)
		at += text_format(line + at, sizeof line - at, "%5d ", tm.tm_year + 1900);
	else
		at += text_format(line + at, sizeof line - at, "%02d:%02d ", tm.tm_hour, tm.tm_min);
	text_format(line + at, sizeof line - at, "%s", name);
	put_text(line);
}

static void read_directory(uint32_t id)
{
	struct handle *h = get_handle();
	uint32_t count = 0;
	if (!h || !h->dir) {
		errno = EBADF;
		failed(id);
		return;
	}
	begin(FXP_NAME, id);
	put32(0);
	errno = 0;
	for (struct dirent *e; count < NAMES && (e = readdir(h->dir));) {
		struct stat st;
		if (fstatat(dirfd(h->dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW))
			continue; /* it went meanwhile */
		put_text(e->d_name);
		put_line(e->d_name, &st);
		put_attributes(&st);
		count++;
	}
	if (!count) {
		status(id, FX_EOF, "");
		return;
	}
	size_t end = used;
	used = 9;
	put32(count);
	used = end;
}

static void make_directory(uint32_t id)
{
	char path[PATH_ROOM];
	struct attributes a;
	bool good = get_path(path);
	get_attributes(&a);
	done(id, good && !damaged && mkdir(path, a.flags & ATTR_MODE ? a.mode : 0777) == 0);
}

/* ---- names ----------------------------------------------------------------------------------------------------------------------- */

/* As realpath(3), but the last component need not be there, nor anything behind it. */
static void real_path(uint32_t id, bool home)
{
	char path[PATH_ROOM], whole[2 * PATH_ROOM], found[PATH_ROOM];
	if (!get_path(path)) {
		failed(id);
		return;
	}
	if (home && path[0] == '~') {
		char *rest = strchr(path, '/');
		if (rest)
			*rest = 0;
		if (!home_of(path + 1, found, sizeof found)) {
			errno = ENOENT;
			failed(id);
			return;
		}
		text_format(whole, sizeof whole, "%s/%s", found, rest ? rest + 1 : "");
	} else if (path[0] == '/') {
		strcpy(whole, path);
	} else {
		if (!getcwd(found, sizeof found))
			strcpy(found, "/");
		text_format(whole, sizeof whole, "%s/%s", found, path);
	}
	if (strlen(whole) >= PATH_ROOM) {
		errno = ENAMETOOLONG;
		failed(id);
		return;
	}
	if (realpath(whole, found)) {
		named(id, found);
		return;
	}
	/* What is missing is cut off until something is there, and put behind it again. */
	size_t end = strlen(whole);
	char all[PATH_ROOM];
	strcpy(all, whole);
	while (end > 1 && errno == ENOENT) {
		while (end > 1 && whole[end - 1] == '/')
			end--;
		while (end > 1 && whole[end - 1] != '/')
			end--;
		whole[end] = 0;
		if (realpath(whole, found)) {
			char *joined = path_join(found, all + end);
			named(id, joined);
			free(joined);
			return;
		}
	}
	failed(id);
}

static void read_link(uint32_t id)
{
	char path[PATH_ROOM], target[PATH_ROOM];
	ssize_t n = get_path(path) ? readlink(path, target, sizeof target - 1) : -1;
	if (n < 0) {
		failed(id);
		return;
	}
	target[n] = 0;
	named(id, target);
}

/* Two paths, and what is done with them. */
static void two_paths(uint32_t id, int (*act)(const char *, const char *))
{
	char first[PATH_ROOM], second[PATH_ROOM];
	done(id, get_path(first) && get_path(second) && act(first, second) == 0);
}

/* Version 3 says that what is there is not replaced. */
static int rename_new(const char *from, const char *to)
{
	struct stat st;
	if (syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 1 /* RENAME_NOREPLACE */) == 0)
		return 0;
	if (errno != EINVAL && errno != ENOSYS)
		return -1;
	if (lstat(to, &st) == 0) {
		errno = EEXIST;
		return -1;
	}
	return rename(from, to);
}

static void remove_name(uint32_t id, int flag)
{
	char path[PATH_ROOM];
	done(id, get_path(path) && unlinkat(AT_FDCWD, path, flag) == 0);
}

/* ---- extensions ------------------------------------------------------------------------------------------------------------------ */

static void file_system(uint32_t id, bool by_handle)
{
	char path[PATH_ROOM];
	struct statvfs s;
	int result = -1;
	if (by_handle) {
		struct handle *h = get_handle();
		if (h)
			result = fstatvfs(h->dir ? dirfd(h->dir) : h->fd, &s);
	} else if (get_path(path)) {
		result = statvfs(path, &s);
	}
	if (result) {
		failed(id);
		return;
	}
	begin(FXP_EXTENDED_REPLY, id);
	put64(s.f_bsize);
	put64(s.f_frsize);
	put64(s.f_blocks);
	put64(s.f_bfree);
	put64(s.f_bavail);
	put64(s.f_files);
	put64(s.f_ffree);
	put64(s.f_favail);
	put64(s.f_fsid);
	put64((s.f_flag & ST_RDONLY ? 1 : 0) | (s.f_flag & ST_NOSUID ? 2 : 0));
	put64(s.f_namemax);
}

static void synchronise(uint32_t id)
{
	struct handle *h = get_file();
	done(id, h && fsync(h->fd) == 0);
}

static void limits(uint32_t id)
{
	begin(FXP_EXTENDED_REPLY, id);
	put64(PACKET);
	put64(DATA);
	put64(DATA);
	put64(HANDLES);
}

static const struct extension {
	const char *name, *version;
} extensions[] = {
	{"posix-rename@openssh.com", "1"}, {"statvfs@openssh.com", "2"},  {"fstatvfs@openssh.com", "2"}, {"hardlink@openssh.com", "1"},
	{"fsync@openssh.com", "1"},        {"lsetstat@openssh.com", "1"}, {"limits@openssh.com", "1"},   {"expand-path@openssh.com", "1"},
};

static void extended(uint32_t id)
{
	size_t i = 0, n;
	while (i < sizeof extensions / sizeof *extensions && !get_word(extensions[i].name))
		i++;
	get_bytes(&n);
	switch (i) {
	case 0: two_paths(id, rename); break;
	case 1: case 2: file_system(id, i == 2); break;
	case 3: two_paths(id, link); break;
	case 4: synchronise(id); break;
	case 5: set_path(id, true); break;
	case 6: limits(id); break;
	case 7: real_path(id, true); break;
	default: status(id, FX_UNSUPPORTED, "not supported");
	}
}

/* ---- packets --------------------------------------------------------------------------------------------------------------------- */

static void version(void)
{
	begin(FXP_VERSION, 3); /* in the place of an id */
	for (size_t i = 0; i < sizeof extensions / sizeof *extensions; i++) {
		put_text(extensions[i].name);
		put_text(extensions[i].version);
	}
}

static void serve(uint8_t type)
{
	uint32_t id = get32();
	switch (type) {
	case FXP_INIT: version(); break;
	case FXP_OPEN: open_file(id); break;
	case FXP_CLOSE: close_handle(id); break;
	case FXP_READ: read_file(id); break;
	case FXP_WRITE: write_file(id); break;
	case FXP_LSTAT: stat_path(id, AT_SYMLINK_NOFOLLOW); break;
	case FXP_FSTAT: stat_file(id); break;
	case FXP_SETSTAT: set_path(id, false); break;
	case FXP_FSETSTAT: set_file(id); break;
	case FXP_OPENDIR: open_directory(id); break;
	case FXP_READDIR: read_directory(id); break;
	case FXP_REMOVE: remove_name(id, 0); break;
	case FXP_MKDIR: make_directory(id); break;
	case FXP_RMDIR: remove_name(id, AT_REMOVEDIR); break;
	case FXP_REALPATH: real_path(id, false); break;
	case FXP_STAT: stat_path(id, 0); break;
	case FXP_RENAME: two_paths(id, rename_new); break;
	case FXP_READLINK: read_link(id); break;
	case FXP_SYMLINK: two_paths(id, symlink); break; /* the target first, as OpenSSH has it */
	case FXP_EXTENDED: extended(id); break;
	default: status(id, FX_UNSUPPORTED, "not supported");
	}
	if (damaged)
		status(id, FX_BAD_MESSAGE, "the packet is damaged");
}

void applet_sftp(void)
{
	uint8_t *buffer = malloc(2 * PACKET);
	size_t have = 0, at = 0;
	answer = malloc(PACKET + 1024);
	if (!buffer || !answer)
		die(NULL, ENOMEM, NULL, "out of memory");
	for (;;) {
		while (have - at >= 4) {
			uint32_t size = (uint32_t)buffer[at] << 24 | (uint32_t)buffer[at + 1] << 16 | (uint32_t)buffer[at + 2] << 8 | buffer[at + 3];
			if (size < 5 || size > PACKET)
				die("bad_request", EINVAL, NULL, "a packet of %u bytes", size);
			if (have - at < size + 4)
				break;
			in = buffer + at + 5;
			in_left = size - 1;
			damaged = false;
			serve(buffer[at + 4]);
			size_t length = used - 4, whole = used;
			used = 0;
			put32((uint32_t)length);
			out_bytes(answer, whole);
			at += size + 4;
		}
		memmove(buffer, buffer + at, have - at);
		have -= at;
		at = 0;
		out_flush();
		ssize_t n = read(0, buffer + have, 2 * PACKET - have);
		if (n == 0)
			return;
		if (n < 0 && errno != EINTR)
			die_errno("stdin");
		have += n > 0 ? (size_t)n : 0;
	}
}
