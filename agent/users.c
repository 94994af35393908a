/* Users and groups of the guest. A static program must not use the C library's lookups, which may load NSS modules; the
 * files are small, and read as untrusted input: bounded, regular files only. */
#define _GNU_SOURCE
#include "agent.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DATABASE_MAX = 1 << 20, ROOM = 16384 };

/* Files of the usual size need no heap, which would be mapped and unmapped for every command. */
static char file_room[ROOM], copy_room[ROOM];

static void give_back(char *text)
{
	if (text != file_room && text != copy_room)
		free(text);
}

static char *copy_of_text(const char *text)
{
	size_t n = strlen(text) + 1;
	return n <= ROOM ? memcpy(copy_room, text, n) : strdup(text);
}

/* The whole file, NUL-terminated, to be given back before the next; NULL when there is none. */
static char *slurp(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	struct stat st;
	char *text = NULL;
	if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
		size_t size = st.st_size < DATABASE_MAX ? (size_t)st.st_size : DATABASE_MAX, have = 0;
		text = size < ROOM ? file_room : malloc(size + 1);
		ssize_t n;
		while (text && have < size && (n = read(fd, text + have, size - have)) > 0)
			have += (size_t)n;
		if (text)
			text[have] = 0;
	}
	if (fd >= 0)
		close(fd);
	return text;
}

/* Cuts the next line out of *at and splits it at colons. NULL at the end. */
static bool next_line(char **at, char *fields[], int count)
{
	char *line = *at;
	if (!line || !*line)
		return false;
	char *end = strchr(line, '\n');
	*at = end ? end + 1 : NULL;
	if (end)
		*end = 0;
	for (int i = 0; i < count; i++) {
		fields[i] = line;
		char *colon = line ? strchr(line, ':') : NULL;
		if (colon)
			*colon = 0;
		line = colon ? colon + 1 : NULL;
	}
	return true;
}

static bool number(const char *s, uint32_t *out)
{
	if (!s || !isdigit((unsigned char)*s) || strlen(s) > 10)
		return false;
	char *end;
	unsigned long long v = text_number(s, &end);
	*out = (uint32_t)v;
	return !*end && v < UINT32_MAX; /* -1 means "unchanged" to the kernel */
}

static void copy(char *out, size_t size, const char *s)
{
	size_t n = s ? strnlen(s, size - 1) : 0;
	if (n)
		memcpy(out, s, n);
	out[n] = 0;
}

/* By name first, as every tool does: a user may be called 1000. */
static bool find_user(char *text, const char *spec, struct account *a)
{
	uint32_t wanted = 0, uid, gid;
	bool numeric = number(spec, &wanted);
	for (int by_name = 1; by_name >= 0; by_name--) {
		if (!by_name && !numeric)
			break;
		char *f[7], *copy_of = copy_of_text(text), *at = copy_of;
		bool found = false;
		while (!found && next_line(&at, f, 7)) {
			if (!f[3] || !number(f[2], &uid) || !number(f[3], &gid))
				continue;
			found = by_name ? !strcmp(f[0], spec) : uid == wanted;
			if (found) {
				a->uid = uid;
				a->gid = gid;
				a->known = true;
				copy(a->name, sizeof a->name, f[0]);
				copy(a->home, sizeof a->home, f[5]);
				copy(a->shell, sizeof a->shell, f[6]);
			}
		}
		give_back(copy_of);
		if (found)
			return true;
	}
	if (numeric)
		a->uid = wanted;
	return numeric;
}

static bool listed(const char *members, const char *name)
{
	size_t n = strlen(name);
	for (const char *at = members; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
		if (!strncmp(at, name, n) && (at[n] == ',' || !at[n]))
			return true;
	return false;
}

static void add_group(struct account *a, gid_t gid)
{
	for (unsigned i = 0; i < a->group_count; i++)
		if (a->groups[i] == gid)
			return;
	if (a->group_count < NGROUPS_ROOM)
		a->groups[a->group_count++] = gid;
}

/* The groups that name the user, and the one called `group` (or with that number) as the primary one. */
static bool find_groups(const char *group, struct account *a)
{
	char *text = slurp("/etc/group"), *at = text, *f[4];
	uint32_t gid, wanted = 0;
	bool numeric = group && number(group, &wanted), found = !group;
	if (numeric) {
		a->gid = wanted;
		found = true;
	}
	while (next_line(&at, f, 4)) {
		if (!f[2] || !number(f[2], &gid))
			continue;
		if (group && !strcmp(f[0], group)) {
			a->gid = gid;
			found = true;
		}
		if (a->known && f[3] && listed(f[3], a->name))
			add_group(a, gid);
	}
	give_back(text);
	/* Like login: the primary group is also one of the list. */
	add_group(a, a->gid);
	return found;
}

const char *account_resolve(const char *spec, struct account *a)
{
	memset(a, 0, sizeof *a);
	char user[2 * NAME_ROOM];
	copy(user, sizeof user, spec && *spec ? spec : "0");
	char *group = strchr(user, ':');
	if (group)
		*group++ = 0;
	char *text = slurp("/etc/passwd");
	bool found = find_user(text ? text : (char[]){""}, *user ? user : "0", a);
	give_back(text);
	if (!found && !strcmp(user, "root"))
		found = true; /* an image without a passwd file has a root all the same */
	if (!found)
		return "no_such_user";
	if (!a->known && a->uid == 0) {
		copy(a->name, sizeof a->name, "root");
		copy(a->home, sizeof a->home, "/root");
	}
	if (!*a->home)
		copy(a->home, sizeof a->home, "/");
	if (!*a->shell)
		copy(a->shell, sizeof a->shell, "/bin/sh");
	return find_groups(group && *group ? group : NULL, a) ? NULL : "no_such_group";
}

bool account_home(const char *name, char *home, size_t size)
{
	struct account a = {0};
	char *text = slurp("/etc/passwd");
	bool found = text && find_user(text, name, &a) && a.known;
	give_back(text);
	if (found)
		copy(home, size, a.home);
	return found;
}

/* For listings: the files are read once, and what was found is remembered. Only applets ask, and they do not live long. */
const char *account_name(uint32_t id, bool group)
{
	enum { REMEMBERED = 64 };
	static struct {
		bool used, group;
		uint32_t id;
		char name[NAME_ROOM];
	} cache[REMEMBERED];
	static char *texts[2];
	static unsigned next;
	for (unsigned i = 0; i < REMEMBERED; i++)
		if (cache[i].used && cache[i].group == group && cache[i].id == id)
			return cache[i].name;
	unsigned slot = next++ % REMEMBERED;
	cache[slot].used = true;
	cache[slot].group = group;
	cache[slot].id = id;
	cache[slot].name[0] = 0;
	if (!texts[group]) {
		char *text = slurp(group ? "/etc/group" : "/etc/passwd");
		texts[group] = text ? strdup(text) : NULL;
		give_back(text);
	}
	if (!texts[group])
		return "";
	char *f[3], *copy_of = copy_of_text(texts[group]), *at = copy_of;
	uint32_t found;
	while (next_line(&at, f, 3))
		if (f[2] && number(f[2], &found) && found == id) {
			copy(cache[slot].name, NAME_ROOM, f[0]);
			break;
		}
	give_back(copy_of);
	return cache[slot].name;
}
