/* The streams of a process: output rings with offsets and acknowledgements, and the way of standard input. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

enum {
	READ_AT_ONCE = 256 << 10, /* for each stream and round, so that one cannot starve the others */
	SEND_AT_ONCE = PAYLOAD_MAX - FRAME_HEADER - FRAME_TRAILER, /* whole frames fill a port's writes of 32 KiB exactly */
	PIPE_SIZE = 1 << 20,
	ENLARGE_AT = 32 << 10,
};

/* Pipes begin at 64 KiB; those that turn out to be busy get more. Not at the start: it costs every short command. */
static void enlarge(int fd, bool *done)
{
	if (!*done)
		fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE);
	*done = true;
}

/* ---- out of the guest -------------------------------------------------------------------------------------------------------- */

static void on_output(struct watch *w, uint32_t events)
{
	struct output *o = (struct output *)w; /* its first member */
	(void)events;
	o->readable = true;
	process_busy(o->process);
}

void output_init(struct output *o, struct process *p, uint32_t stream, int fd, uint32_t size)
{
	*o = (struct output){
		.watch = {.ready = on_output, .fd = fd}, .process = p, .stream = stream, .size = size, .window = size, .open = fd >= 0};
	if (fd >= 0)
		watch_add(&o->watch, EPOLLIN);
}

uint64_t output_oldest(const struct output *o)
{
	return o->head > o->size ? o->head - o->size : 0;
}

void output_close(struct output *o)
{
	o->open = o->readable = false;
	watch_close(&o->watch);
}

void output_free(struct output *o)
{
	output_close(o);
	if (o->ring)
		munmap(o->ring, o->size);
	o->ring = NULL;
}

static bool ring_ready(struct output *o)
{
	if (o->ring)
		return true;
	void *ring = mmap(NULL, o->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ring == MAP_FAILED)
		return false;
	/* An applet's fork neither copies nor sees what others wrote. */
	madvise(ring, o->size, MADV_DONTFORK);
	o->ring = ring;
	return true;
}

static int ring_pieces(const struct output *o, uint64_t from, size_t n, struct iovec iov[2])
{
	size_t at = (size_t)(from & (o->size - 1)), first = o->size - at;
	iov[0] = (struct iovec){o->ring + at, n < first ? n : first};
	if (n <= first)
		return 1;
	iov[1] = (struct iovec){o->ring, n - first};
	return 2;
}

bool output_read(struct output *o)
{
	if (!o->open || !o->readable)
		return false;
	size_t room = o->size < READ_AT_ONCE ? o->size : READ_AT_ONCE;
	if (!o->process->discard) {
		uint64_t held = o->head - o->acked;
		if (held >= o->size)
			return false; /* backpressure: an acknowledgement makes the process busy again */
		if (room > o->size - held)
			room = (size_t)(o->size - held);
	}
	if (!ring_ready(o))
		return false;
	struct iovec iov[2];
	ssize_t n = readv(o->watch.fd, iov, ring_pieces(o, o->head, room, iov));
	if (n > 0) {
		o->head += (uint64_t)n;
		o->last_ns = now_ns();
		if (n >= ENLARGE_AT && !o->process->pty)
			enlarge(o->watch.fd, &o->enlarged);
		return true;
	}
	if (n < 0 && errno == EINTR)
		return true;
	o->readable = false;
	if (n && errno == EAGAIN)
		return false;
	if (n && is_connection(o->process))
		o->process->status = errno << 8; /* its exit code */
	output_close(o); /* the last writer has gone; a terminal says EIO */
	return false;
}

bool output_send(struct output *o)
{
	if (!o->attached || !channel_can_send())
		return false;
	uint64_t oldest = output_oldest(o);
	uint64_t flight = o->sent > o->acked ? o->sent - o->acked : 0;
	if (o->sent < oldest && flight < o->window) {
		/* Overwritten before it could be sent: the frame's offset shows the gap. What was never sent does not fill the window,
		 * or nothing would ever be sent, and so acknowledged, again. */
		o->sent = oldest;
		o->acked = oldest - flight;
	}
	uint64_t n = o->head - o->sent;
	if (n > SEND_AT_ONCE)
		n = SEND_AT_ONCE;
	if (flight >= o->window || o->sent < oldest)
		n = 0;
	else if (n > o->window - flight)
		n = o->window - flight;
	if (n) {
		struct iovec iov[2] = {{0}};
		ring_pieces(o, o->sent, (size_t)n, iov);
		bool ok = channel_send_ring(o->stream, o->sent, iov);
		if (ok)
			o->sent += n;
		return ok;
	}
	if (!o->open && o->sent == o->head && !o->eof_sent)
		o->eof_sent = channel_send(FRAME_EOF, o->stream, o->head, NULL, 0);
	return false;
}

void output_acked(struct output *o, uint64_t offset)
{
	if (offset > o->sent)
		offset = o->sent;
	if (offset > o->acked) {
		o->acked = offset;
		process_busy(o->process);
	}
}

void output_attach(struct output *o, const uint64_t *offset)
{
	uint64_t oldest = output_oldest(o), from = offset ? *offset : oldest;
	if (from < oldest)
		from = oldest;
	if (from > o->head)
		from = o->head; /* a restored machine knows less than the host has seen */
	o->sent = o->acked = from;
	o->attached = true;
	o->eof_sent = false;
}

/* ---- into the guest ------------------------------------------------------------------------------------------------------------- */

static void on_input(struct watch *w, uint32_t events)
{
	struct input *i = (struct input *)w; /* its first member */
	if (events & EPOLLOUT)
		i->writable = true;
	if (events & (EPOLLERR | EPOLLHUP))
		i->gone = true;
	process_busy(i->process);
}

void input_init(struct input *i, struct process *p, int fd)
{
	*i = (struct input){.watch = {.ready = on_input, .fd = fd}, .process = p, .open = fd >= 0, .writable = true, .gone = fd < 0};
	/* Without standard input there is nothing whose closing would be news. */
	i->gone_told = fd < 0;
	if (fd >= 0)
		watch_add(&i->watch, EPOLLOUT);
}

void input_close(struct input *i)
{
	i->open = false;
	watch_close(&i->watch);
	free(i->ring);
	i->ring = NULL;
}

void input_free(struct input *i)
{
	input_close(i);
}

static ssize_t input_write(struct input *i, const uint8_t *data, size_t n)
{
	size_t done = 0;
	while (i->writable && done < n) {
		ssize_t w = write(i->watch.fd, data + done, n - done);
		if (w > 0) {
			done += (size_t)w;
		} else if (w < 0 && errno == EINTR) {
			continue;
		} else {
			i->writable = false;
			if (w < 0 && errno != EAGAIN)
				i->gone = true;
			else if (!i->process->pty)
				enlarge(i->watch.fd, &i->enlarged);
		}
	}
	return (ssize_t)done;
}

/* Acknowledges in steps: one frame for every write would double the number of frames. */
static void acknowledge(struct input *i, bool all)
{
	uint64_t step = i->eof || all ? 1 : STDIN_BUFFER / 8;
	if (i->taken - i->acked >= step && channel_synced() && channel_send(FRAME_ACK, 4 * i->process->id, i->taken, NULL, 0))
		i->acked = i->taken;
}

static void drop_all(struct input *i)
{
	i->taken = i->wanted;
	if (i->open)
		input_close(i);
	if (!i->gone_told && channel_synced()) {
		static const uint8_t event[] = {0x81, 0xa1, 'e', 0xac, 's', 't', 'd', 'i', 'n', '_', 'c', 'l', 'o', 's', 'e', 'd'};
		i->gone_told = channel_send(FRAME_EVENT, i->process->id, 0, event, sizeof event);
	}
	acknowledge(i, true);
}

static void write_buffered(struct input *i)
{
	while (i->writable && !i->gone && i->taken < i->wanted) {
		size_t at = (size_t)(i->taken & (STDIN_BUFFER - 1)), n = STDIN_BUFFER - at;
		if (n > i->wanted - i->taken)
			n = (size_t)(i->wanted - i->taken);
		i->taken += (uint64_t)input_write(i, i->ring + at, n);
	}
}

static void finish(struct input *i)
{
	if (i->process->pty) {
		/* A terminal has no end: its end-of-file character is typed instead, as a user would. */
		struct termios t;
		if (tcgetattr(i->watch.fd, &t) == 0 && t.c_lflag & ICANON && t.c_cc[VEOF])
			input_write(i, &t.c_cc[VEOF], 1);
		i->eof = false;
		i->eof_at = UINT64_MAX;
	} else {
		shutdown(i->watch.fd, SHUT_WR); /* of a socket, which is open for reading still */
		input_close(i);
		i->gone = i->gone_told = true;
	}
}

void input_work(struct input *i)
{
	if (i->open && !i->gone && i->ring)
		write_buffered(i);
	if (i->open && !i->gone && i->eof && i->taken == i->eof_at)
		finish(i);
	if (i->gone)
		drop_all(i);
	else
		acknowledge(i, i->taken == i->wanted);
}

void input_data(struct input *i, uint64_t offset, const uint8_t *data, size_t length)
{
	if (offset > i->wanted)
		return; /* a gap: sent before a synchronisation that the host has not finished; it sends again */
	uint64_t seen = i->wanted - offset;
	if (seen >= length) {
		if (i->acked == i->taken && i->taken > offset && channel_synced())
			channel_send(FRAME_ACK, 4 * i->process->id, i->taken, NULL, 0);
		return;
	}
	data += seen;
	length -= (size_t)seen;
	if (i->eof && i->wanted + length > i->eof_at)
		return;
	process_busy(i->process);
	if (i->gone) {
		i->wanted += length;
		return;
	}
	if (i->taken == i->wanted) {
		/* The usual case: straight from the channel's buffer into the pipe. */
		size_t n = (size_t)input_write(i, data, length);
		i->wanted += n;
		i->taken += n;
		data += n;
		length -= n;
		if (i->gone)
			i->wanted += length;
		if (!length || i->gone)
			return;
	}
	if (!i->ring && !(i->ring = malloc(STDIN_BUFFER)))
		return;
	size_t room = (size_t)(STDIN_BUFFER - (i->wanted - i->taken));
	if (length > room)
		length = room; /* more in flight than the protocol allows: the rest comes again, or the host is wrong */
	while (length) {
		size_t at = (size_t)(i->wanted & (STDIN_BUFFER - 1)), n = STDIN_BUFFER - at;
		if (n > length)
			n = length;
		memcpy(i->ring + at, data, n);
		data += n;
		length -= n;
		i->wanted += n;
	}
}

void input_eof(struct input *i, uint64_t offset)
{
	if (offset < i->wanted || i->eof || (i->process->pty && i->eof_at == UINT64_MAX))
		return;
	i->eof = true;
	i->eof_at = offset;
	process_busy(i->process);
}
