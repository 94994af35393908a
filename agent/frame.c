#include "frame.h"

#include <string.h>

static const uint8_t MAGIC[16] = {0xf5, 'S', 'T', 'O', 'K', 'E', 'R', '-', 'S', 'Y', 'N', 'C', '\r', '\n', 0x1a, '\n'};

/* Headers are 20 bytes: a table of 16 entries is fast enough, and stays in one cache line. */
uint32_t crc32_of(const void *data, size_t length)
{
	static const uint32_t table[16] = {
		0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
		0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
	};
	const uint8_t *p = data;
	uint32_t crc = 0xffffffff;
	while (length--) {
		crc ^= *p++;
		crc = crc >> 4 ^ table[crc & 15];
		crc = crc >> 4 ^ table[crc & 15];
	}
	return ~crc;
}

uint32_t get_u32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

uint64_t get_u64(const uint8_t *p)
{
	return get_u32(p) | (uint64_t)get_u32(p + 4) << 32;
}

void put_u32(uint8_t *p, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(v >> 8 * i);
}

void put_u64(uint8_t *p, uint64_t v)
{
	put_u32(p, (uint32_t)v);
	put_u32(p + 4, (uint32_t)(v >> 32));
}

static uint32_t trailer_of(uint32_t header_crc)
{
	return (header_crc ^ 0xa5a5a5a5u) | 1;
}

uint32_t frame_header(uint8_t header[FRAME_HEADER], uint8_t type, uint32_t channel, uint64_t offset, uint32_t length)
{
	header[0] = 'S';
	header[1] = 'K';
	header[2] = type;
	header[3] = 0;
	put_u32(header + 4, channel);
	put_u64(header + 8, offset);
	put_u32(header + 16, length);
	uint32_t crc = crc32_of(header, 20);
	put_u32(header + 20, crc);
	return trailer_of(crc);
}

void parser_reset(struct parser *p)
{
	p->hunting = true;
	p->start = p->end = 0;
}

uint8_t *parser_space(struct parser *p, size_t *room)
{
	/* Moving the rest to the front is rare: at most one incomplete frame for every three whole ones. */
	if (p->start && PARSER_SIZE - p->end < PAYLOAD_MAX) {
		memmove(p->buffer, p->buffer + p->start, p->end - p->start);
		p->end -= p->start;
		p->start = 0;
	}
	*room = PARSER_SIZE - p->end;
	return p->buffer + p->end;
}

void parser_added(struct parser *p, size_t n)
{
	p->end += n;
}

static void consume(struct parser *p, size_t n)
{
	p->start += n;
	if (p->start == p->end)
		p->start = p->end = 0; /* keeps to the pages already touched */
}

static enum parsed hunt(struct parser *p, uint8_t preamble[PREAMBLE_SIZE])
{
	while (p->start < p->end) {
		uint8_t *from = p->buffer + p->start, *at = memchr(from, MAGIC[0], p->end - p->start);
		if (!at) {
			consume(p, p->end - p->start);
			break;
		}
		consume(p, (size_t)(at - from));
		size_t have = p->end - p->start;
		if (memcmp(at, MAGIC, have < sizeof MAGIC ? have : sizeof MAGIC)) {
			consume(p, 1);
			continue;
		}
		if (have < PREAMBLE_SIZE)
			break;
		if (crc32_of(at, PREAMBLE_SIZE - 4) != get_u32(at + PREAMBLE_SIZE - 4)) {
			consume(p, 1);
			continue;
		}
		memcpy(preamble, at, PREAMBLE_SIZE);
		consume(p, PREAMBLE_SIZE);
		p->hunting = false;
		return PARSED_PREAMBLE;
	}
	return PARSED_NOTHING;
}

static enum parsed damaged(struct parser *p)
{
	/* Nothing is dropped: a preamble may lie anywhere in these bytes, even at their start. */
	p->hunting = true;
	return PARSED_DAMAGE;
}

enum parsed parser_next(struct parser *p, struct frame *f, uint8_t preamble[PREAMBLE_SIZE])
{
	if (p->hunting)
		return hunt(p, preamble);
	const uint8_t *h = p->buffer + p->start;
	size_t have = p->end - p->start;
	if ((have > 0 && h[0] != 'S') || (have > 1 && h[1] != 'K'))
		return damaged(p);
	if (have < FRAME_HEADER)
		return PARSED_NOTHING;
	uint32_t crc = crc32_of(h, 20), length = get_u32(h + 16);
	if (crc != get_u32(h + 20) || length > PAYLOAD_MAX)
		return damaged(p);
	if (have < FRAME_HEADER + (size_t)length + FRAME_TRAILER)
		return PARSED_NOTHING;
	if (get_u32(h + FRAME_HEADER + length) != trailer_of(crc))
		return damaged(p);
	*f = (struct frame){
		.type = h[2],
		.flags = h[3],
		.channel = get_u32(h + 4),
		.offset = get_u64(h + 8),
		.length = length,
		.payload = h + FRAME_HEADER,
	};
	consume(p, FRAME_HEADER + (size_t)length + FRAME_TRAILER);
	return PARSED_FRAME;
}
