/* The watch applet: inotify over a directory, or a whole tree of them. */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

enum {
	CHANGES = IN_CREATE | IN_DELETE | IN_MODIFY | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_ATTRIB | IN_EXCL_UNLINK,
	ITSELF = IN_DELETE_SELF | IN_MOVE_SELF,
	WATCHES = 8192,
	PAIR_MS = 20, /* the two halves of a move come together */
};

static int notify;
static char **paths; /* by watch descriptor, which the kernel counts up from 1 */
static int paths_size;
static unsigned watched, limit;
static bool recursive, told_overflow;
static int root_watch;

/* Within what was read at once, a file that is written again and again is reported once. */
static char last_modified[PATH_ROOM];

static struct {
	uint32_t cookie; /* 0: none */
	char *path;
	bool directory;
} moving;

static void event(const char *kind, const char *path, bool directory, const char *old)
{
	static uint8_t buffer[3 * PATH_ROOM];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, path ? old ? 4 : 3 : 1);
	mpw_key_str(&w, "e", kind);
	if (path) {
		mpw_str(&w, "path");
		mpw_bin(&w, path, strlen(path));
		mpw_key_bool(&w, "directory", directory);
	}
	if (old) {
		mpw_str(&w, "old_path");
		mpw_bin(&w, old, strlen(old));
	}
	if (!w.full)
		out_record(&w);
	if (strcmp(kind, "modified"))
		last_modified[0] = 0;
}

static void overflow(void)
{
	if (!told_overflow)
		event("overflow", NULL, false, NULL);
	told_overflow = true;
}

static int add_watch(const char *path, uint32_t flags)
{
	if (watched == limit) {
		overflow();
		return -1;
	}
	int wd = inotify_add_watch(notify, path, CHANGES | flags);
	if (wd < 0) {
		if (errno == ENOSPC)
			overflow();
		return -1;
	}
	if (wd >= paths_size) {
		int size = wd + 1 < 64 ? 64 : 2 * wd;
		paths = realloc(paths, (size_t)size * sizeof *paths);
		if (!paths)
			die(NULL, ENOMEM, NULL, "out of memory");
		memset(paths + paths_size, 0, (size_t)(size - paths_size) * sizeof *paths);
		paths_size = size;
	}
	if (!paths[wd])
		watched++;
	free(paths[wd]);
	paths[wd] = strdup(path);
	return wd;
}

/* Watches what is below. A directory that just appeared may have content already, which nobody reported. */
static void add_below(const char *path, bool report, int depth)
{
	int dir = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	size_t n;
	bool more;
	if (dir < 0 || depth == TREE_DEPTH) {
		if (dir >= 0)
			close(dir);
		return;
	}
	char **names = directory_names(dir, 1 << 20, &n, &more);
	for (size_t i = 0; i < n; i++) {
		struct stat st;
		char *below = path_join(path, names[i]);
		if (fstatat(dir, names[i], &st, AT_SYMLINK_NOFOLLOW) == 0) {
			bool directory = S_ISDIR(st.st_mode);
			if (report)
				event("created", below, directory, NULL);
			if (directory && strlen(below) < PATH_ROOM && add_watch(below, IN_ONLYDIR | IN_DONT_FOLLOW) >= 0)
				add_below(below, report, depth + 1);
		}
		free(below);
		free(names[i]);
	}
	free(names);
	close(dir);
}

static void appeared(const char *path, bool report)
{
	if (recursive && add_watch(path, IN_ONLYDIR | IN_DONT_FOLLOW) >= 0)
		add_below(path, report, 0);
}

/* A directory of the tree is called something else now, or (to is NULL) is no longer part of it. */
static void renamed(const char *from, const char *to)
{
	size_t n = strlen(from);
	for (int wd = 1; wd < paths_size; wd++) {
		if (!paths[wd] || strncmp(paths[wd], from, n) || (paths[wd][n] && paths[wd][n] != '/'))
			continue;
		if (to) {
			char *path = malloc(strlen(to) + strlen(paths[wd] + n) + 1);
			if (!path)
				die(NULL, ENOMEM, NULL, "out of memory");
			strcpy(path, to);
			strcat(path, paths[wd] + n);
			free(paths[wd]);
			paths[wd] = path;
		} else {
			inotify_rm_watch(notify, wd); /* IN_IGNORED follows */
		}
	}
}

static void moved_out(void)
{
	if (!moving.cookie)
		return;
	event("removed", moving.path, moving.directory, NULL);
	if (moving.directory && recursive)
		renamed(moving.path, NULL);
	free(moving.path);
	moving.cookie = 0;
}

static void moved_in(const char *path, bool directory, uint32_t cookie)
{
	if (moving.cookie != cookie || !cookie) {
		moved_out();
		event("created", path, directory, NULL);
		if (directory)
			appeared(path, true);
		return;
	}
	event("moved", path, directory, moving.path);
	if (directory && recursive)
		renamed(moving.path, path);
	free(moving.path);
	moving.cookie = 0;
}

static void modified(const char *path)
{
	if (!strcmp(path, last_modified))
		return;
	if (strlen(path) < sizeof last_modified)
		strcpy(last_modified, path);
	event("modified", path, false, NULL);
}

static void ended(void)
{
	moved_out();
	event("ended", NULL, false, NULL);
	out_flush();
	_exit(0);
}

static void handle(const struct inotify_event *e)
{
	if (e->mask & IN_Q_OVERFLOW) {
		told_overflow = false;
		overflow();
		return;
	}
	if (e->wd < 0 || e->wd >= paths_size || !paths[e->wd])
		return;
	if (e->wd == root_watch && e->mask & (ITSELF | IN_IGNORED | IN_UNMOUNT))
		ended();
	if (e->mask & IN_IGNORED) {
		free(paths[e->wd]);
		paths[e->wd] = NULL;
		watched--;
		return;
	}
	bool directory = e->mask & IN_ISDIR;
	if (moving.cookie && !(e->mask & IN_MOVED_TO))
		moved_out();
	if (!e->len) {
		/* About the watched thing itself. Of a directory below, its parent has told already. */
		if (e->wd != root_watch)
			return;
		if (e->mask & (IN_MODIFY | IN_CLOSE_WRITE))
			modified(paths[e->wd]);
		else if (e->mask & IN_ATTRIB)
			event("attributes", paths[e->wd], directory, NULL);
		return;
	}
	char *path = path_join(paths[e->wd], e->name);
	if (e->mask & IN_CREATE) {
		event("created", path, directory, NULL);
		if (directory)
			appeared(path, true);
	} else if (e->mask & IN_DELETE) {
		event("removed", path, directory, NULL);
	} else if (e->mask & (IN_MODIFY | IN_CLOSE_WRITE)) {
		modified(path);
	} else if (e->mask & IN_ATTRIB) {
		event("attributes", path, directory, NULL);
	} else if (e->mask & IN_MOVED_TO) {
		moved_in(path, directory, e->cookie);
	} else if (e->mask & IN_MOVED_FROM) {
		moving.cookie = e->cookie;
		moving.path = path;
		moving.directory = directory;
		return;
	}
	free(path);
}

void applet_watch(void)
{
	static _Alignas(struct inotify_event) char buffer[65536];
	char *path = path_argument("path", false);
	struct stat st;
	/* A directory that is somebody's working directory is not gone when it is removed: it must not be ours. */
	if (chdir("/"))
		die_errno("/");
	recursive = mp_bool_or(&applet_args, "recursive", false);
	limit = (unsigned)mp_u64_or(&applet_args, "limit", WATCHES, 1 << 20);
	notify = inotify_init1(IN_CLOEXEC);
	if (notify < 0 || stat(path, &st))
		die_errno(path);
	root_watch = add_watch(path, ITSELF);
	if (root_watch < 0)
		die(errno == ENOSPC ? "too_many" : NULL, errno, path, "%s: cannot be watched: %s", path, strerror(errno));
	if (recursive && S_ISDIR(st.st_mode))
		add_below(path, false, 0);
	event("ready", NULL, false, NULL);
	out_flush();
	struct pollfd wait = {.fd = notify, .events = POLLIN};
	for (;;) {
		if (moving.cookie && poll(&wait, 1, PAIR_MS) == 0) {
			moved_out();
			out_flush();
		}
		ssize_t n = read(notify, buffer, sizeof buffer);
		if (n < 0 && errno != EINTR)
			die_errno(path);
		for (char *at = buffer; at < buffer + n;) {
			const struct inotify_event *e = (const struct inotify_event *)(void *)at;
			handle(e);
			at += sizeof *e + e->len;
		}
		last_modified[0] = 0;
		out_flush();
	}
}
