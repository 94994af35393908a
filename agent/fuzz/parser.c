/* The frame parser: any bytes, cut anywhere. The first byte says where. */
#include "../frame.c"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct parser p;
	if (!size)
		return 0;
	size_t cut = (size_t)(data[0] & 0x7f) + 1;
	parser_reset(&p);
	p.hunting = data[0] & 0x80;
	data++;
	size--;
	while (size) {
		size_t room, n = size < cut ? size : cut;
		uint8_t *to = parser_space(&p, &room);
		if (!room)
			abort(); /* there is always room when everything was parsed */
		if (n > room)
			n = room;
		memcpy(to, data, n);
		parser_added(&p, n);
		data += n;
		size -= n;
		for (;;) {
			struct frame f;
			uint8_t preamble[PREAMBLE_SIZE];
			enum parsed what = parser_next(&p, &f, preamble);
			if (what == PARSED_NOTHING)
				break;
			if (what == PARSED_FRAME && (f.length > PAYLOAD_MAX || (f.length && f.payload[0] + f.payload[f.length - 1] > 510)))
				abort();
			if (p.start > p.end || p.end > PARSER_SIZE)
				abort();
		}
	}
	return 0;
}
