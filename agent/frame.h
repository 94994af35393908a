/* Frames and the preamble: docs/agent-protocol.md, "Synchronisation" and "Frames". Pure: no input or output here, so that
 * the fuzzer and the vectors run the very code that runs in the guest. */
#ifndef STOKER_FRAME_H
#define STOKER_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
	FRAME_HEADER = 24,
	FRAME_TRAILER = 4,
	PAYLOAD_MAX = 65536,
	FRAME_MAX = FRAME_HEADER + PAYLOAD_MAX + FRAME_TRAILER,
	PREAMBLE_SIZE = 36,
	PING_MAX = 4096,
	/* Room for one largest frame that is still incomplete and a generous read behind it. */
	PARSER_SIZE = 4 * PAYLOAD_MAX,
};

enum frame_type {
	FRAME_HELLO = 0x01,
	FRAME_WELCOME = 0x02,
	FRAME_CALL = 0x10,
	FRAME_REPLY = 0x11,
	FRAME_EVENT = 0x12,
	FRAME_DATA = 0x20,
	FRAME_ACK = 0x21,
	FRAME_EOF = 0x22,
	FRAME_PING = 0x30,
	FRAME_PONG = 0x31,
};

struct frame {
	uint8_t type, flags;
	uint32_t channel, length;
	uint64_t offset;
	const uint8_t *payload; /* inside the parser's buffer, good until the parser is given more */
};

enum parsed {
	PARSED_NOTHING,  /* more bytes are needed */
	PARSED_FRAME,
	PARSED_PREAMBLE, /* a synchronisation: everything before it is void */
	PARSED_DAMAGE,   /* not a frame; the parser hunts from here on */
};

struct parser {
	bool hunting;
	size_t start, end; /* the bytes not yet understood */
	uint8_t buffer[PARSER_SIZE];
};

uint32_t crc32_of(const void *data, size_t length);
uint32_t get_u32(const uint8_t *p);
uint64_t get_u64(const uint8_t *p);
void put_u32(uint8_t *p, uint32_t v);
void put_u64(uint8_t *p, uint64_t v);

/* Writes the 24 bytes of a header and returns the trailer that belongs behind the payload. */
uint32_t frame_header(uint8_t header[FRAME_HEADER], uint8_t type, uint32_t channel, uint64_t offset, uint32_t length);

void parser_reset(struct parser *p);
/* Where the next bytes go, and how many fit. There is always room when everything parsable has been parsed. */
uint8_t *parser_space(struct parser *p, size_t *room);
void parser_added(struct parser *p, size_t n);
enum parsed parser_next(struct parser *p, struct frame *f, uint8_t preamble[PREAMBLE_SIZE]);

#endif
