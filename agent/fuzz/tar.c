/* The headers of an archive, the names in it, and the guest's user database: text from anywhere. */
#include "under.h"
#include <setjmp.h>

static const uint8_t *input;
static size_t input_left;
static ssize_t fuzz_read(int fd, void *buffer, size_t n)
{
	(void)fd;
	n = n < input_left ? n : input_left;
	memcpy(buffer, input, n);
	input += n;
	input_left -= n;
	return (ssize_t)n;
}

#define read fuzz_read
#define skip tar_skip
#define text tar_text
#include "../tar_in.c"
#include "../tar_xattr.c"
#undef skip
#undef text
#undef read
#define put text_put
#include "../text.c"
#undef put
#include "../frame.c"
#include "../msgpack.c"
#define number users_number
#include "../users.c"
#undef number

/* An applet frees nothing when it dies. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

struct mp applet_args;
static jmp_buf out;
void die(const char *code, int error, const char *path, const char *format, ...)
{
	(void)code; (void)error; (void)path; (void)format;
	longjmp(out, 1);
}
void die_errno(const char *path) { die(NULL, 0, path, "-"); }
uint64_t copy_bytes(int from, int to, uint64_t most, const char *path)
{
	(void)from; (void)to; (void)path;
	return most;
}
void make_directories(const char *path, mode_t mode) { (void)path; (void)mode; }
char *path_argument(const char *key, bool optional) { (void)key; (void)optional; return NULL; }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct entry e;
	if (size && data[0] == 'u') {
		struct account a = {0};
		char *text_copy = malloc(size);
		memcpy(text_copy, data + 1, size - 1);
		text_copy[size - 1] = 0;
		find_user(text_copy, "alice", &a);
		find_user(text_copy, "1000", &a);
		char *at = text_copy, *f[4];
		while (next_line(&at, f, 4))
			if (f[3] && listed(f[3], "alice"))
				add_group(&a, a.gid++);
		free(text_copy);
		return 0;
	}
	input = data;
	input_left = size;
	if (setjmp(out) == 0)
		while (next_entry(&e)) {
			char *name = relative(e.name);
			if (*name == '/' || strstr(name, "//") || !strcmp(name, "..") || !strncmp(name, "../", 3) || strstr(name, "/../"))
				abort();
			free(name);
			free(e.name);
			free(e.link);
			tar_skip(e.size + padding(e.size));
		}
	return 0;
}
