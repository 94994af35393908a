/* Just enough msgpack: a reader over bytes that were checked as a whole first, and a writer into a bounded buffer. */
#ifndef STOKER_MSGPACK_H
#define STOKER_MSGPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MP_DEPTH = 8 };

enum mp_type { MP_NIL, MP_BOOL, MP_UINT, MP_INT, MP_STR, MP_BIN, MP_ARRAY, MP_MAP, MP_OTHER, MP_MISSING };

struct mp {
	enum mp_type type; /* MP_INT only for negative numbers, MP_OTHER: floats and extensions, skipped over */
	uint32_t count;    /* bytes of a string, elements of an array, pairs of a map */
	union {
		bool boolean;
		uint64_t u;
		int64_t i;
		const uint8_t *data; /* of a string */
		const uint8_t *body; /* of an array or a map: its first element */
	};
	const uint8_t *end; /* where the checked bytes end */
};

/* One value and nothing behind it, at most MP_DEPTH deep, every length inside. Only then may the rest be used. */
bool mp_open(const uint8_t *data, size_t length, struct mp *value);

struct mp mp_get(const struct mp *map, const char *key); /* MP_MISSING when absent, or when this is no map */
/* Iteration over an array (or the alternating keys and values of a map): start with *at = body. */
struct mp mp_next(const struct mp *container, const uint8_t **at);

size_t mp_size(const struct mp *container); /* bytes of its elements */

bool mp_is_text(const struct mp *v); /* str or bin */
bool mp_text_is(const struct mp *v, const char *s);
bool mp_u64(const struct mp *v, uint64_t *out);
bool mp_i64(const struct mp *v, int64_t *out);
uint64_t mp_u64_or(const struct mp *map, const char *key, uint64_t fallback, uint64_t max); /* clamped to max */
bool mp_bool_or(const struct mp *map, const char *key, bool fallback);
/* Copies text with a NUL behind it. False when it is no text, does not fit, or has a NUL inside. */
bool mp_copy(const struct mp *v, char *out, size_t size);

struct mp_writer {
	uint8_t *data;
	size_t length, size;
	bool full; /* something did not fit: the content is useless */
};

void mpw_init(struct mp_writer *w, void *data, size_t size);
void mpw_map(struct mp_writer *w, uint32_t pairs);
void mpw_array(struct mp_writer *w, uint32_t elements);
/* A container whose count is known only at the end: the mark goes to mpw_close with the count. */
size_t mpw_open_map(struct mp_writer *w);
size_t mpw_open_array(struct mp_writer *w);
void mpw_close(struct mp_writer *w, size_t mark, uint32_t count);
void mpw_nil(struct mp_writer *w);
void mpw_bool(struct mp_writer *w, bool b);
void mpw_uint(struct mp_writer *w, uint64_t u);
void mpw_int(struct mp_writer *w, int64_t i);
void mpw_str(struct mp_writer *w, const char *s);
void mpw_strn(struct mp_writer *w, const char *s, size_t n);
void mpw_bin(struct mp_writer *w, const void *data, size_t n);
void mpw_key_uint(struct mp_writer *w, const char *key, uint64_t u);
void mpw_key_str(struct mp_writer *w, const char *key, const char *s);
void mpw_key_bool(struct mp_writer *w, const char *key, bool b);

#endif
