/* A machine that is about to be copied: file systems written out and, if asked, frozen; free memory filled with zeros. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

enum { MOUNTS = 256, PIECE = 32 << 20, PIECES = 65536, SETTLE = 3 };

static uint64_t took(uint64_t *since)
{
	uint64_t now = now_ns(), us = (now - *since) / 1000;
	*since = now;
	return us;
}

/* FIFREEZE or FITHAW for every file system on a device. Nested ones come later in the list: frozen backwards, thawed forwards. */
static unsigned each_file_system(unsigned long what, int *error, char where[64])
{
	static struct mount_line lines[MOUNTS];
	unsigned n = mount_lines(lines, MOUNTS), done = 0;
	for (unsigned i = 0; i < n; i++) {
		const struct mount_line *l = &lines[what == FIFREEZE ? n - 1 - i : i];
		if (strncmp(l->source, "/dev/", 5))
			continue;
		int fd = open(l->target, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK);
		/* Mounted twice: once is enough. One that knows no freezing has been written out all the same. */
		if (fd >= 0 && syscall(SYS_ioctl, fd, what, 0) == 0) {
			done++;
		} else if (errno != EBUSY && errno != EINVAL && errno != ENOTDIR && !*error) {
			*error = errno;
			text_format(where, 64, "%.63s", l->target);
		}
		if (fd >= 0)
			close(fd);
	}
	return done;
}

unsigned quiet_thaw(void)
{
	char where[64];
	int error = 0;
	return each_file_system(FITHAW, &error, where);
}

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	if (fd >= 0)
		close(fd);
	return ok;
}

static uint64_t free_bytes(void)
{
	struct sysinfo s;
	return sysinfo(&s) ? 0 : (uint64_t)s.freeram * s.mem_unit;
}

/*
 * The kernel hands out nothing but zeros: whoever takes all free memory and gives it back leaves zeros behind. What a process had
 * there is gone from the machine's memory, and a page of zeros needs no room in a snapshot. A little is left for everybody else,
 * below which the kernel would begin to reclaim.
 */
static uint64_t fill_free_memory(uint64_t *left)
{
	char text[32];
	uint64_t taken = 0, reserve = 4 << 20;
	if (read_small("/proc/sys/vm/min_free_kbytes", text, sizeof text))
		reserve += 3 * 1024 / 2 * text_number(text, NULL); /* kswapd rests above this */
	put("/proc/self/oom_score_adj", "1000");
	for (int pieces = 0, settled = 0; pieces < PIECES && settled < SETTLE; pieces++) {
		uint64_t before = free_bytes();
		if (before <= reserve) {
			settled++;
			continue;
		}
		uint64_t want = before - reserve < PIECE ? before - reserve : PIECE;
		void *at = mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_NORESERVE, -1, 0);
		if (at == MAP_FAILED)
			break;
		taken += want;
		settled += want < PIECE;
	}
	*left = free_bytes();
	return taken;
}

static void drop_caches(struct quiet_result *r)
{
	/* Twice: what the first round let go of may have held something else. */
	for (int i = 0; i < 2 && !r->drop_error; i++)
		if (!put("/proc/sys/vm/drop_caches", "3\n"))
			r->drop_error = errno;
}

void quiet_child(bool freeze, bool drop, int report)
{
	struct quiet_result r = {0};
	uint64_t since = now_ns();
	close_inherited(report);
	if (agent.mode == MODE_INIT) {
		sync();
		r.sync_us = took(&since);
		if (drop) {
			drop_caches(&r);
			r.zeroed = fill_free_memory(&r.left);
			r.drop_us = took(&since);
		}
		if (freeze) {
			r.frozen = each_file_system(FIFREEZE, &r.freeze_error, r.where);
			r.freeze_us = took(&since);
		}
	}
	_exit(write(report, &r, sizeof r) != sizeof r);
}
