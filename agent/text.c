/* Formatting without the C library's printf, which brings floating point and a seventh of the agent's size with it. */
#include "agent.h"

#include <stdarg.h>
#include <string.h>
#include <unistd.h>

struct out {
	char *at, *end;
	size_t length;
};

static void put(struct out *o, const char *s, size_t n)
{
	o->length += n;
	for (; n && o->at < o->end; n--)
		*o->at++ = *s++;
}

static void put_number(struct out *o, uint64_t v, unsigned base, unsigned width, bool zeros)
{
	char digits[24], *at = digits + sizeof digits;
	do
		*--at = "0123456789abcdef"[v % base];
	while (v /= base);
	for (size_t n = (size_t)(digits + sizeof digits - at); n < width; n++)
		put(o, zeros ? "0" : " ", 1);
	put(o, at, (size_t)(digits + sizeof digits - at));
}

/* %s %.*s %.Ns %d %u %x %o %c %%, with h-less l and ll, a width and leading zeros. Always NUL-terminated. */
size_t text_formatv(char *buffer, size_t size, const char *format, va_list args)
{
	struct out o = {buffer, buffer + size - 1, 0};
	for (const char *f = format; *f; f++) {
		if (*f != '%') {
			put(&o, f, 1);
			continue;
		}
		bool zeros = f[1] == '0';
		unsigned width = 0, wide = 0;
		size_t most = SIZE_MAX;
		for (f++; *f >= '0' && *f <= '9'; f++)
			width = width * 10 + (unsigned)(*f - '0');
		if (*f == '.' && *++f == '*') {
			most = (size_t)va_arg(args, int);
			f++;
		} else if (f[-1] == '.') {
			for (most = 0; *f >= '0' && *f <= '9'; f++)
				most = most * 10 + (size_t)(*f - '0');
		}
		for (; *f == 'l'; f++)
			wide++;
		if (*f == 's') {
			const char *s = va_arg(args, const char *);
			put(&o, s, strnlen(s, most));
		} else if (*f == 'c') {
			char c = (char)va_arg(args, int);
			put(&o, &c, 1);
		} else if (*f == 'd') {
			int64_t v = wide ? va_arg(args, long) : va_arg(args, int);
			if (v < 0)
				put(&o, "-", 1);
			put_number(&o, v < 0 ? -(uint64_t)v : (uint64_t)v, 10, width, zeros);
		} else if (*f == 'u' || *f == 'x' || *f == 'o') {
			uint64_t v = wide ? va_arg(args, unsigned long) : va_arg(args, unsigned);
			put_number(&o, v, *f == 'u' ? 10 : *f == 'x' ? 16 : 8, width, zeros);
		} else {
			put(&o, f, 1);
		}
	}
	*o.at = 0;
	return o.length;
}

size_t text_format(char *buffer, size_t size, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	size_t n = text_formatv(buffer, size, format, args);
	va_end(args);
	return n;
}

uint64_t text_number(const char *s, char **end)
{
	uint64_t v = 0;
	while (*s == ' ' || *s == '\t')
		s++;
	for (; *s >= '0' && *s <= '9'; s++)
		if (__builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, (uint64_t)(*s - '0'), &v))
			v = UINT64_MAX;
	if (end)
		*end = (char *)s;
	return v;
}

char *text_find(const char *s, const char *word)
{
	size_t n = strlen(word);
	for (; *s; s++)
		if (!strncmp(s, word, n))
			return (char *)s;
	return NULL;
}

void text_complain(const char *format, ...)
{
	char line[640];
	va_list args;
	va_start(args, format);
	size_t n = text_formatv(line, sizeof line, format, args);
	va_end(args);
	if (write(2, line, n < sizeof line ? n : sizeof line - 1) < 0)
		return; /* nobody listens to standard error */
}
