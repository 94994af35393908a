/* Runs the agent's own parser and msgpack reader over vectors: one command a line on stdin, one answer on stdout. */
#include "frame.h"
#include "msgpack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t unhex(const char *s, uint8_t *out, size_t size)
{
	size_t n = 0;
	for (; s[0] && s[1] && s[0] != '\n' && s[0] != ' ' && n < size; s += 2) {
		char two[3] = {s[0], s[1], 0};
		out[n++] = (uint8_t)strtoul(two, NULL, 16);
	}
	return n;
}

static void hex(const uint8_t *p, size_t n)
{
	for (size_t i = 0; i < n; i++)
		printf("%02x", p[i]);
}

static void show(const struct mp *v)
{
	const uint8_t *at = v->body;
	switch (v->type) {
	case MP_NIL: printf("nil"); break;
	case MP_BOOL: printf(v->boolean ? "true" : "false"); break;
	case MP_UINT: printf("%llu", (unsigned long long)v->u); break;
	case MP_INT: printf("%lld", (long long)v->i); break;
	case MP_STR: printf("s:"); hex(v->data, v->count); break;
	case MP_BIN: printf("b:"); hex(v->data, v->count); break;
	case MP_ARRAY:
	case MP_MAP:
		printf(v->type == MP_MAP ? "{" : "[");
		for (uint32_t i = 0; i < v->count; i++) {
			struct mp one = mp_next(v, &at);
			printf(i ? "," : "");
			show(&one);
			if (v->type == MP_MAP) {
				one = mp_next(v, &at);
				printf("=");
				show(&one);
			}
		}
		printf(v->type == MP_MAP ? "}" : "]");
		break;
	default: printf("other");
	}
}

static void run_stream(const uint8_t *data, size_t length, size_t cut)
{
	static struct parser p;
	parser_reset(&p);
	for (size_t at = 0; at < length;) {
		size_t room, n = length - at < cut ? length - at : cut;
		uint8_t *to = parser_space(&p, &room);
		if (n > room)
			n = room;
		memcpy(to, data + at, n);
		parser_added(&p, n);
		at += n;
		for (;;) {
			struct frame f;
			uint8_t preamble[PREAMBLE_SIZE];
			enum parsed what = parser_next(&p, &f, preamble);
			if (what == PARSED_NOTHING)
				break;
			if (what == PARSED_DAMAGE) {
				printf("damage;");
			} else if (what == PARSED_PREAMBLE) {
				printf("preamble ");
				hex(preamble, sizeof preamble);
				printf(";");
			} else {
				printf("frame %u %u %llu ", f.type, f.channel, (unsigned long long)f.offset);
				hex(f.payload, f.length);
				printf(";");
			}
		}
	}
}

int main(void)
{
	enum { ROOM = 4 << 20 };
	char *line = malloc(2 * ROOM);
	uint8_t *bytes = malloc(ROOM);
	while (fgets(line, 2 * ROOM, stdin)) {
		char *word = strchr(line, ' ') + 1;
		if (!strncmp(line, "frame ", 6)) {
			uint8_t header[FRAME_HEADER], trailer[4];
			unsigned type = (unsigned)strtoul(word, &word, 10);
			uint32_t channel = (uint32_t)strtoul(word, &word, 10);
			uint64_t offset = strtoull(word, &word, 10);
			size_t n = unhex(word + 1, bytes, ROOM);
			put_u32(trailer, frame_header(header, (uint8_t)type, channel, offset, (uint32_t)n));
			hex(header, sizeof header);
			hex(bytes, n);
			hex(trailer, sizeof trailer);
		} else if (!strncmp(line, "stream ", 7)) {
			size_t cut = strtoul(word, &word, 10);
			run_stream(bytes, unhex(word + 1, bytes, ROOM), cut);
		} else if (!strncmp(line, "msgpack ", 8)) {
			/* A copy of exactly that size: the sanitizer sees every byte read beyond it. */
			size_t n = unhex(word, bytes, ROOM);
			uint8_t *exact = malloc(n);
			struct mp v;
			if (n)
				memcpy(exact, bytes, n);
			if (mp_open(exact, n, &v))
				show(&v);
			else
				printf("bad");
			free(exact);
		}
		printf("\n");
	}
	free(line);
	free(bytes);
	return 0;
}
