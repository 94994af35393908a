#include "msgpack.h"

#include <string.h>

static uint64_t big_endian(const uint8_t *p, unsigned n)
{
	uint64_t v = 0;
	while (n--)
		v = v << 8 | *p++;
	return v;
}

/* Reads the value at *at as far as its header (a string: with its bytes) and steps over that. False: it does not fit. */
static bool head(const uint8_t **at, const uint8_t *end, struct mp *v)
{
	const uint8_t *p = *at;
	if (p >= end)
		return false;
	uint8_t tag = *p++;
	size_t left = (size_t)(end - p);
	*v = (struct mp){.type = MP_OTHER, .end = end};
	uint64_t n = 0;    /* bytes that belong to the value, behind its length */
	unsigned wide = 0; /* bytes of number or length behind the tag */

	if (tag <= 0x7f) {
		v->type = MP_UINT;
		v->u = tag;
	} else if (tag >= 0xe0) {
		v->type = MP_INT;
		v->i = (int8_t)tag;
	} else if (tag <= 0x8f || (tag >= 0x90 && tag <= 0x9f)) {
		v->type = tag <= 0x8f ? MP_MAP : MP_ARRAY;
		v->count = tag & 15;
		v->body = p;
	} else if (tag <= 0xbf) {
		v->type = MP_STR;
		n = v->count = tag & 31;
	} else if (tag == 0xc0) {
		v->type = MP_NIL;
	} else if (tag == 0xc2 || tag == 0xc3) {
		v->type = MP_BOOL;
		v->boolean = tag & 1;
	} else if (tag == 0xc1) {
		return false;
	} else {
		switch (tag) {
		case 0xc4: case 0xc7: case 0xd9: wide = 1; break;
		case 0xc5: case 0xc8: case 0xda: case 0xdc: case 0xde: wide = 2; break;
		case 0xc6: case 0xc9: case 0xdb: case 0xdd: case 0xdf: wide = 4; break;
		case 0xcc: case 0xd0: wide = 1; break;
		case 0xcd: case 0xd1: wide = 2; break;
		case 0xca: case 0xce: case 0xd2: wide = 4; break;
		case 0xcb: case 0xcf: case 0xd3: wide = 8; break;
		default: n = 1 + ((uint64_t)1 << (tag - 0xd4)); /* fixext 1 .. 16, with its type byte */
		}
		if (left < wide)
			return false;
		uint64_t u = big_endian(p, wide);
		p += wide;
		left -= wide;
		if (tag >= 0xc4 && tag <= 0xc6) {
			v->type = MP_BIN;
			n = v->count = (uint32_t)u;
		} else if (tag >= 0xc7 && tag <= 0xc9) {
			n = u + 1;
		} else if (tag >= 0xcc && tag <= 0xcf) {
			v->type = MP_UINT;
			v->u = u;
		} else if (tag >= 0xd0 && tag <= 0xd3) {
			unsigned shift = 64 - 8 * wide;
			int64_t i = (int64_t)(u << shift) >> shift;
			v->type = i < 0 ? MP_INT : MP_UINT;
			v->i = i;
		} else if (tag >= 0xd9 && tag <= 0xdb) {
			v->type = MP_STR;
			n = v->count = (uint32_t)u;
		} else if (tag >= 0xdc) {
			v->type = tag <= 0xdd ? MP_ARRAY : MP_MAP;
			v->count = (uint32_t)u;
			v->body = p;
		}
	}
	if (n > left)
		return false;
	if (v->type == MP_STR || v->type == MP_BIN)
		v->data = p;
	*at = p + n;
	return true;
}

/* Steps over a whole value. The recursion is bounded by depth; a count larger than the bytes left ends at the first lack. */
static bool skip(const uint8_t **at, const uint8_t *end, int depth)
{
	struct mp v;
	if (!head(at, end, &v))
		return false;
	if (v.type != MP_ARRAY && v.type != MP_MAP)
		return true;
	if (depth == 0)
		return false;
	uint64_t elements = v.type == MP_MAP ? 2 * (uint64_t)v.count : v.count;
	while (elements--)
		if (!skip(at, end, depth - 1))
			return false;
	return true;
}

bool mp_open(const uint8_t *data, size_t length, struct mp *value)
{
	const uint8_t *at = data, *end = data + length;
	if (!skip(&at, end, MP_DEPTH) || at != end)
		return false;
	at = data;
	return head(&at, end, value);
}

struct mp mp_next(const struct mp *container, const uint8_t **at)
{
	struct mp v = {.type = MP_MISSING};
	const uint8_t *here = *at;
	if (!head(at, container->end, &v))
		return (struct mp){.type = MP_MISSING};
	*at = here;
	skip(at, container->end, MP_DEPTH);
	return v;
}

struct mp mp_get(const struct mp *map, const char *key)
{
	if (map->type == MP_MAP) {
		const uint8_t *at = map->body;
		for (uint32_t i = 0; i < map->count; i++) {
			struct mp k = mp_next(map, &at), v = mp_next(map, &at);
			if (k.type == MP_STR && mp_text_is(&k, key))
				return v;
		}
	}
	return (struct mp){.type = MP_MISSING};
}

bool mp_is_text(const struct mp *v)
{
	return v->type == MP_STR || v->type == MP_BIN;
}

bool mp_text_is(const struct mp *v, const char *s)
{
	return mp_is_text(v) && v->count == strlen(s) && memcmp(v->data, s, v->count) == 0;
}

bool mp_u64(const struct mp *v, uint64_t *out)
{
	if (v->type != MP_UINT)
		return false;
	*out = v->u;
	return true;
}

bool mp_i64(const struct mp *v, int64_t *out)
{
	if (v->type == MP_INT || (v->type == MP_UINT && v->u <= INT64_MAX)) {
		*out = v->i;
		return true;
	}
	return false;
}

uint64_t mp_u64_or(const struct mp *map, const char *key, uint64_t fallback, uint64_t max)
{
	struct mp v = mp_get(map, key);
	uint64_t u = v.type == MP_UINT ? v.u : fallback;
	return u < max ? u : max;
}

bool mp_bool_or(const struct mp *map, const char *key, bool fallback)
{
	struct mp v = mp_get(map, key);
	return v.type == MP_BOOL ? v.boolean : fallback;
}

bool mp_copy(const struct mp *v, char *out, size_t size)
{
	if (!mp_is_text(v) || v->count >= size || memchr(v->data, 0, v->count))
		return false;
	memcpy(out, v->data, v->count);
	out[v->count] = 0;
	return true;
}

void mpw_init(struct mp_writer *w, void *data, size_t size)
{
	*w = (struct mp_writer){.data = data, .size = size};
}

static uint8_t *take(struct mp_writer *w, size_t n)
{
	if (w->full || n > w->size - w->length) {
		w->full = true;
		return NULL;
	}
	w->length += n;
	return w->data + w->length - n;
}

static void tagged(struct mp_writer *w, uint8_t tag, uint64_t u, unsigned wide)
{
	uint8_t *p = take(w, 1 + wide);
	if (!p)
		return;
	*p++ = tag;
	while (wide--)
		*p++ = (uint8_t)(u >> 8 * wide);
}

static void sized(struct mp_writer *w, uint8_t tag8, uint8_t tag16, uint64_t n)
{
	if (tag8 && n < 256)
		tagged(w, tag8, n, 1);
	else if (n < 65536)
		tagged(w, tag16, n, 2);
	else
		tagged(w, (uint8_t)(tag16 + 1), n, 4);
}

void mpw_map(struct mp_writer *w, uint32_t pairs)
{
	if (pairs < 16)
		tagged(w, (uint8_t)(0x80 | pairs), 0, 0);
	else
		sized(w, 0, 0xde, pairs);
}

void mpw_array(struct mp_writer *w, uint32_t elements)
{
	if (elements < 16)
		tagged(w, (uint8_t)(0x90 | elements), 0, 0);
	else
		sized(w, 0, 0xdc, elements);
}

size_t mpw_open_map(struct mp_writer *w)
{
	tagged(w, 0xde, 0, 2);
	return w->length;
}

size_t mpw_open_array(struct mp_writer *w)
{
	tagged(w, 0xdc, 0, 2);
	return w->length;
}

void mpw_close(struct mp_writer *w, size_t mark, uint32_t count)
{
	if (w->full || count > 65535) {
		w->full = true;
		return;
	}
	w->data[mark - 2] = (uint8_t)(count >> 8);
	w->data[mark - 1] = (uint8_t)count;
}

void mpw_nil(struct mp_writer *w)
{
	tagged(w, 0xc0, 0, 0);
}

void mpw_bool(struct mp_writer *w, bool b)
{
	tagged(w, b ? 0xc3 : 0xc2, 0, 0);
}

void mpw_uint(struct mp_writer *w, uint64_t u)
{
	if (u < 128)
		tagged(w, (uint8_t)u, 0, 0);
	else if (u < 256)
		tagged(w, 0xcc, u, 1);
	else if (u < 65536)
		tagged(w, 0xcd, u, 2);
	else if (u <= UINT32_MAX)
		tagged(w, 0xce, u, 4);
	else
		tagged(w, 0xcf, u, 8);
}

void mpw_int(struct mp_writer *w, int64_t i)
{
	if (i >= 0)
		mpw_uint(w, (uint64_t)i);
	else if (i >= -32)
		tagged(w, (uint8_t)i, 0, 0);
	else
		tagged(w, 0xd3, (uint64_t)i, 8);
}

void mpw_strn(struct mp_writer *w, const char *s, size_t n)
{
	if (n < 32)
		tagged(w, (uint8_t)(0xa0 | n), 0, 0);
	else
		sized(w, 0xd9, 0xda, n);
	uint8_t *p = take(w, n);
	if (p)
		memcpy(p, s, n);
}

void mpw_str(struct mp_writer *w, const char *s)
{
	mpw_strn(w, s, strlen(s));
}

void mpw_bin(struct mp_writer *w, const void *data, size_t n)
{
	sized(w, 0xc4, 0xc5, n);
	uint8_t *p = take(w, n);
	if (p && n)
		memcpy(p, data, n);
}

void mpw_key_uint(struct mp_writer *w, const char *key, uint64_t u)
{
	mpw_str(w, key);
	mpw_uint(w, u);
}

void mpw_key_str(struct mp_writer *w, const char *key, const char *s)
{
	mpw_str(w, key);
	mpw_str(w, s);
}

void mpw_key_bool(struct mp_writer *w, const char *key, bool b)
{
	mpw_str(w, key);
	mpw_bool(w, b);
}

size_t mp_size(const struct mp *container)
{
	const uint8_t *at = container->body;
	uint32_t n = container->count * (container->type == MP_MAP ? 2 : 1);
	while (n--)
		mp_next(container, &at);
	return (size_t)(at - container->body);
}
