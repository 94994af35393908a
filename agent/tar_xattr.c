/* Extended attributes in a tar: pax records SCHILY.xattr.NAME, as GNU tar and star write them. */
#define _GNU_SOURCE
#include "files.h"
#include "tar.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>

enum { LIST_MAX = 64 << 10, VALUE_MAX = 64 << 10, COUNT_MAX = 256 };

/* An equals sign ends a record's key: it and the percent sign are written as hexadecimal digits. */
static void escape(char *to, size_t size, const char *name)
{
	size_t n = 0;
	for (; *name && n + 4 < size; name++)
		if (*name == '=' || *name == '%')
			n += text_format(to + n, size - n, "%s", *name == '=' ? "%3D" : "%25");
		else
			to[n++] = *name;
	to[n] = 0;
}

static void unescape(char *s)
{
	char *to = s;
	for (; *s; s++, to++) {
		bool equals = !strncmp(s, "%3D", 3), percent = !strncmp(s, "%25", 3);
		*to = equals ? '=' : percent ? '%' : *s;
		s += equals || percent ? 2 : 0;
	}
	*to = 0;
}

void tar_xattrs_of(const char *path, const char *said, void (*add)(const char *key, const void *value, size_t size))
{
	static char names[LIST_MAX], value[VALUE_MAX], key[XATTR_KEY_ROOM];
	ssize_t all = llistxattr(path, names, sizeof names);
	if (all < 0 && errno != ENOTSUP)
		die_errno(said);
	for (char *name = names; name < names + all; name += strlen(name) + 1) {
		ssize_t n = lgetxattr(path, name, value, sizeof value);
		if (n < 0 && errno == ENODATA)
			continue; /* it went meanwhile */
		if (n < 0)
			die_errno(said);
		size_t prefix = text_format(key, sizeof key, "%s", TAR_XATTR);
		escape(key + prefix, sizeof key - prefix, name);
		add(key, value, (size_t)n);
	}
}

void tar_xattr_keep(struct tar_xattr **list, const char *key, const char *value, size_t size)
{
	unsigned count = 0;
	for (const struct tar_xattr *x = *list; x; x = x->next)
		count++;
	size_t n = strlen(key) + 1;
	struct tar_xattr *x = count < COUNT_MAX && size <= VALUE_MAX ? malloc(sizeof *x + n + size) : NULL;
	if (!x)
		die("bad_archive", EBADMSG, NULL, "too many or too large extended attributes");
	x->next = *list;
	x->size = size;
	memcpy(x->name, key, n);
	unescape(x->name);
	memcpy(x->name + n, value, size);
	x->value = x->name + n;
	*list = x;
}

void tar_xattr_free(struct tar_xattr *list)
{
	while (list) {
		struct tar_xattr *next = list->next;
		free(list);
		list = next;
	}
}

/* A file system that has none (tmpfs) takes the files without. */
void tar_xattr_put(const struct tar_xattr *list, const char *path, const char *said)
{
	for (const struct tar_xattr *x = list; x; x = x->next)
		if (lsetxattr(path, x->name, x->value, x->size, 0) && errno != ENOTSUP)
			die(NULL, errno, said, "%s: cannot set the extended attribute %s: %s", said, x->name, strerror(errno));
}
