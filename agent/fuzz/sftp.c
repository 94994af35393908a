/* The sftp applet on hostile packets, with a file system that is not there: every call it makes answers by the input's own bytes. */
#include "under.h"
#include <dirent.h>
#include <setjmp.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

static const uint8_t *input;
static size_t input_left;
static uint32_t turn;

static ssize_t fuzz_read(int fd, void *buffer, size_t n)
{
	n = fd == 0 ? n < input_left ? n : input_left : n < 100 ? n : 100;
	if (fd == 0) {
		memcpy(buffer, input, n);
		input += n;
		input_left -= n;
	} else {
		memset(buffer, 'r', n);
	}
	return (ssize_t)n;
}
/* Fails now and then. */
static int some(void)
{
	errno = (int)(turn % 40) + 1;
	return turn++ % 5 ? 0 : -1;
}
static int some_path(const char *path) { return strlen(path) < 4096 ? some() : -1; }
static ssize_t some_bytes(void *buffer, size_t n)
{
	memset(buffer, 'x', n);
	return some() ? -1 : (ssize_t)(turn % 3 ? n : n / 2);
}
static ssize_t some_link(const char *path, char *buffer, size_t n) { return some_path(path) ? -1 : some_bytes(buffer, n); }
static ssize_t some_write(const void *data, size_t n)
{
	uint8_t sum = 0;
	for (size_t i = 0; i < n; i++)
		sum ^= ((const uint8_t *)data)[i]; /* all of it is there to be read */
	turn += sum & 1;
	return some() ? -1 : (ssize_t)n;
}
static int some_stat(struct stat *st)
{
	memset(st, (int)(turn & 0xff), sizeof *st);
	return some();
}
static char *some_real(const char *path, char *found)
{
	errno = ENOENT;
	return strlen(path) % 2 ? strcpy(found, "/there") : NULL;
}
static struct dirent some_name;
static struct dirent *some_entry(void)
{
	memset(some_name.d_name, 'n', sizeof some_name.d_name - 1);
	return some() ? NULL : &some_name;
}

#define read fuzz_read
#define write(fd, data, n) ((void)(fd), some_write(data, n))
#define open(path, ...) (some_path(path) ? -1 : 9)
#define close(fd) ((void)(fd), some())
#define pread(fd, data, n, at) ((void)(fd), (void)(at), some_bytes(data, n))
#define pwrite(fd, data, n, at) ((void)(fd), (void)(at), some_write(data, n))
#define opendir(path) (some_path(path) ? NULL : (DIR *)&some_name)
#define closedir(d) ((void)(d), some())
#define readdir(d) ((void)(d), some_entry())
#define dirfd(d) ((void)(d), 9)
#define fstat(fd, st) ((void)(fd), some_stat(st))
#define lstat(path, st) (some_path(path) ? -1 : some_stat(st))
#define fstatat(fd, path, st, flag) ((void)(fd), (void)(flag), some_path(path) ? -1 : some_stat(st))
#define statvfs(path, s) (memset(s, 1, sizeof *(s)), some_path(path))
#define fstatvfs(fd, s) (memset(s, 1, sizeof *(s)), some())
#define truncate(path, n) ((void)(n), some_path(path))
#define ftruncate(fd, n) ((void)(fd), (void)(n), some())
#define fchmodat(fd, path, mode, flag) ((void)(flag), some_path(path))
#define fchmod(fd, mode) ((void)(fd), some())
#define fchownat(fd, path, uid, gid, flag) ((void)(flag), some_path(path))
#define fchown(fd, uid, gid) ((void)(fd), some())
#define utimensat(fd, path, times, flag) ((void)(flag), (void)(times), some_path(path))
#define futimens(fd, times) ((void)(fd), (void)(times), some())
#undef mkdir
#define mkdir(path, mode) some_path(path)
#define unlinkat(fd, path, flag) ((void)(flag), some_path(path))
#define readlink some_link
#define realpath some_real
#define syscall(...) some()
#define fsync(fd) ((void)(fd), some())
static int fuzz_two(const char *a, const char *b) { return some_path(a) || some_path(b) ? -1 : 0; }
#define rename fuzz_two
#define link fuzz_two
#define symlink fuzz_two
#define status sftp_status
#include "../sftp.c"
#undef read
#undef write
#undef open
#undef close
#undef status
#define put text_put
#include "../text.c"
#undef put

const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

static jmp_buf out;
void die(const char *code, int error, const char *path, const char *format, ...)
{
	(void)code; (void)error; (void)path; (void)format;
	longjmp(out, 1);
}
void die_errno(const char *path) { die(NULL, 0, path, "-"); }
void out_bytes(const void *data, size_t n) { some_write(data, n); }
void out_flush(void) {}
bool home_of(const char *user, char *home, size_t size)
{
	text_format(home, size, "/home/%s", *user ? user : "own");
	return strlen(user) < 32;
}
const char *account_name(uint32_t id, bool group) { return id % 2 ? "" : group ? "a-group-with-a-long-name" : "user"; }
char *path_join(const char *directory, const char *name)
{
	char *joined = malloc(strlen(directory) + strlen(name) + 2);
	return strcat(strcat(strcpy(joined, directory), "/"), name);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	input = data;
	input_left = size;
	turn = (uint32_t)size;
	memset(handles, 0, sizeof handles);
	if (!setjmp(out))
		applet_sftp();
	free(answer);
	return 0;
}
