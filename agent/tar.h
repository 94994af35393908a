/* The 512 bytes every entry of a tar begins with (POSIX ustar). */
#ifndef STOKER_TAR_H
#define STOKER_TAR_H

#include <stddef.h>

enum { TAR_BLOCK = 512, TAR_PAX_MAX = 1 << 20, XATTR_KEY_ROOM = 1024 };

#define TAR_XATTR "SCHILY.xattr."

struct tar_header {
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100], magic[6], version[2], user[32], group[32],
		major[8], minor[8], prefix[155], rest[12];
};

/* tar_xattr.c: `path` is where the kernel finds the entry (its last component is not followed), `said` its name for people. */
struct tar_xattr {
	struct tar_xattr *next;
	const char *value;
	size_t size;
	char name[];
};
void tar_xattrs_of(const char *path, const char *said, void (*add)(const char *key, const void *value, size_t size));
void tar_xattr_keep(struct tar_xattr **list, const char *key, const char *value, size_t size);
void tar_xattr_free(struct tar_xattr *list);
void tar_xattr_put(const struct tar_xattr *list, const char *path, const char *said);

#endif
