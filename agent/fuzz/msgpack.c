/* The msgpack reader: what mp_open accepts can be walked without leaving the bytes; writing it again reads the same. */
#include "../msgpack.c"

#include <stdlib.h>

static size_t count;

static void walk(const struct mp *v, struct mp_writer *w, int depth)
{
	const uint8_t *at = v->body;
	struct mp one;
	if (depth > MP_DEPTH)
		abort();
	count++;
	switch (v->type) {
	case MP_NIL: mpw_nil(w); break;
	case MP_BOOL: mpw_bool(w, v->boolean); break;
	case MP_UINT: mpw_uint(w, v->u); break;
	case MP_INT: mpw_int(w, v->i); break;
	case MP_STR: mpw_strn(w, (const char *)v->data, v->count); break;
	case MP_BIN: mpw_bin(w, v->data, v->count); break;
	case MP_ARRAY:
		mpw_array(w, v->count);
		for (uint32_t i = 0; i < v->count; i++) {
			one = mp_next(v, &at);
			walk(&one, w, depth + 1);
		}
		break;
	case MP_MAP:
		mpw_map(w, v->count);
		for (uint32_t i = 0; i < 2 * v->count; i++) {
			one = mp_next(v, &at);
			walk(&one, w, depth + 1);
		}
		mp_get(v, "argv");
		break;
	case MP_OTHER: mpw_nil(w); break;
	case MP_MISSING: abort();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t out[400000], again[400000];
	struct mp v;
	uint8_t *exact = malloc(size + 1);
	memcpy(exact, data, size);
	if (mp_open(exact, size, &v)) {
		struct mp_writer w, x;
		char text[64];
		int64_t i;
		mpw_init(&w, out, sizeof out);
		walk(&v, &w, 0);
		mp_copy(&v, text, sizeof text);
		mp_i64(&v, &i);
		if (!w.full) {
			if (!mp_open(out, w.length, &v))
				abort();
			mpw_init(&x, again, sizeof again);
			walk(&v, &x, 0);
			if (x.length != w.length || memcmp(out, again, w.length))
				abort();
		}
	}
	free(exact);
	return 0;
}
