/* The 512 bytes every entry of a tar begins with (POSIX ustar). */
#ifndef STOKER_TAR_H
#define STOKER_TAR_H

enum { TAR_BLOCK = 512, TAR_PAX_MAX = 1 << 20 };

struct tar_header {
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100], magic[6], version[2], user[32], group[32],
		major[8], minor[8], prefix[155], rest[12];
};

#endif
