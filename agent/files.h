/* What the applets share: docs/files.md. Each runs in a child of the agent, which ends with it: nothing is freed, and an error
 * is the end. */
#ifndef STOKER_FILES_H
#define STOKER_FILES_H

#include "agent.h"

#include <sys/stat.h>

enum { IO_BUFFER = 128 << 10, TREE_DEPTH = 512 };

extern struct mp applet_args;

/* Ends the applet: the error's map on stderr, code 1. The code is derived from the errno when it is NULL. */
void die(const char *code, int error, const char *path, const char *format, ...) __attribute__((noreturn, format(printf, 4, 5)));
void die_errno(const char *path) __attribute__((noreturn)); /* what errno says about the path */
void die_request(const char *what) __attribute__((noreturn));

/* A path argument: absolute, without "//" and "/./". Ends the applet when it is missing (unless optional: NULL). */
char *path_argument(const char *key, bool optional);
bool home_of(const char *user, char *home, size_t size); /* an empty name: of whom the applet runs as */
char *path_join(const char *directory, const char *name);
const char *text_temporary(void); /* a name beside a final one that nobody else uses */
const char *path_name(const char *path); /* the last component, "/" for the root */
/* Opens the directory that holds the last component (made with its parents if wanted), which *name points to. */
int open_parent(const char *path, const char **name, bool make);
void make_directories(const char *path, mode_t mode);

/* stdout, buffered. */
void out_bytes(const void *data, size_t n);
void out_flush(void);
void out_record(const struct mp_writer *w); /* with its length in front */
void out_entry(int dir, const char *name, const char *path, const struct stat *st);
void out_entry_of(const char *path, bool follow);

/* Copies up to `most` bytes between descriptors, without a detour through this process where the kernel can. */
uint64_t copy_bytes(int from, int to, uint64_t most, const char *path);

/* Names in a directory, sorted; at most `most` of them, `*more` says whether there were others. */
char **directory_names(int dir, size_t most, size_t *count, bool *more);
void remove_entry(int dir, const char *name, const char *path, bool recursive, dev_t device, int depth);
void remove_path(const char *path, bool recursive, bool missing_ok);

void applet_list(void);
void applet_read(void);
void applet_write(void);
void applet_watch(void);
void applet_sftp(void);
void applet_tar_out(void);
void applet_tar_in(void);
/* The same for move: from one file system to another through a pipe. */
void tar_write_tree(const char *path, const char *as, uint64_t limit);
void tar_read_tree(const char *target, bool preserve);

#endif
