/* The byte stream to the host: synchronisation, frames in, frames out.
 *
 * Everything that goes out is copied into one queue. A virtio port takes at most 32 KiB with one write, and each write, of 28
 * bytes as well as of 32 KiB, costs a notification of the VMM: copying a large payload behind its header is far cheaper than
 * sending header, payload and trailer from where they are.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	/* Parsing stops when less than this is free: a reply always finds room. */
	REPLY_ROOM = FRAME_MAX + 8192,
	FLUSH_AT = 32 << 10,
	QUEUE_SIZE = 4 * PAYLOAD_MAX,
};

static struct {
	uint8_t data[QUEUE_SIZE];
	size_t start, end;
} queue;

static struct parser parser;
static struct watch port_in = {.fd = -1}, port_out = {.fd = -1}, listener = {.fd = -1};
static bool readable, writable, synced, greeted, held;
uint64_t channel_generation;

static void queue_clear(void)
{
	queue.start = queue.end = 0;
}

static void out_of_sync(void)
{
	parser_reset(&parser);
	queue_clear();
	synced = greeted = false;
	processes_detach_all();
}

static void on_port(struct watch *w, uint32_t events)
{
	if (w == &port_in && events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP))
		readable = true;
	if (w->fd == port_out.fd && events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
		writable = true;
}

void channel_open(int in, int out)
{
	port_in = (struct watch){.ready = on_port, .fd = in};
	port_out = (struct watch){.ready = on_port, .fd = out};
	fcntl(in, F_SETFL, fcntl(in, F_GETFL) | O_NONBLOCK);
	fcntl(out, F_SETFL, fcntl(out, F_GETFL) | O_NONBLOCK);
	out_of_sync();
	readable = writable = true;
	/* A regular file or /dev/null cannot be watched, and need not be. */
	watch_add(&port_in, EPOLLIN | EPOLLRDHUP | (in == out ? EPOLLOUT : 0));
	if (in != out)
		watch_add(&port_out, EPOLLOUT);
}

/* Processes of the guest can reach a vsock port of the guest, too, and the agent obeys whoever it listens to. */
static bool from_host(int fd)
{
	struct sockaddr_vm peer;
	socklen_t size = sizeof peer;
	if (getpeername(fd, (struct sockaddr *)&peer, &size))
		return false;
	return peer.svm_family != AF_VSOCK || peer.svm_cid == VMADDR_CID_HOST;
}

static void on_listener(struct watch *w, uint32_t events)
{
	(void)events;
	int fd;
	while ((fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
		if (!from_host(fd)) {
			close(fd);
			continue;
		}
		if (port_in.fd >= 0)
			watch_close(&port_in);
		channel_open(fd, fd);
	}
}

void channel_listen(int fd)
{
	listener = (struct watch){.ready = on_listener, .fd = fd};
	out_of_sync();
	watch_add(&listener, EPOLLIN);
}

void channel_hold(bool on)
{
	held = on;
}

bool channel_synced(void)
{
	return synced && greeted;
}

/* The other end is gone. Of a virtio port this is no more than a hint: the driver may hand over the first bytes of a new host
 * before it says that there is one, so nothing is forgotten here. The next host's zeros and preamble sort it out. */
static void host_gone(void)
{
	readable = false;
	processes_detach_all();
	if (listener.fd >= 0) {
		out_of_sync();
		watch_close(&port_in);
		port_out.fd = -1;
	} else if (agent.mode == MODE_STDIO) {
		agent.leaving = true;
	}
}

/* ---- out ------------------------------------------------------------------------------------------------------------------------- */

static uint8_t *queue_take(size_t n)
{
	if (queue.start && QUEUE_SIZE - queue.end < n) {
		memmove(queue.data, queue.data + queue.start, queue.end - queue.start);
		queue.end -= queue.start;
		queue.start = 0;
	}
	if (QUEUE_SIZE - queue.end < n)
		return NULL;
	queue.end += n;
	return queue.data + queue.end - n;
}

static size_t queue_free(void)
{
	return QUEUE_SIZE - (queue.end - queue.start);
}

bool channel_send(uint8_t type, uint32_t channel, uint64_t offset, const void *payload, size_t length)
{
	/* Everything but a reply leaves the room that replies need. */
	size_t total = FRAME_HEADER + length + FRAME_TRAILER;
	if (length > PAYLOAD_MAX || (type != FRAME_REPLY && type != FRAME_WELCOME && queue_free() < total + REPLY_ROOM))
		return false;
	uint8_t *p = queue_take(total);
	if (!p)
		return false;
	uint32_t trailer = frame_header(p, type, channel, offset, (uint32_t)length);
	if (length)
		memcpy(p + FRAME_HEADER, payload, length);
	put_u32(p + FRAME_HEADER + length, trailer);
	return true;
}

bool channel_can_send(void)
{
	return channel_synced() && queue_free() >= REPLY_ROOM + FRAME_MAX;
}

bool channel_send_ring(uint32_t stream, uint64_t offset, const struct iovec pieces[2])
{
	size_t first = pieces[0].iov_len, length = first + pieces[1].iov_len;
	uint8_t *p;
	if (!channel_can_send() || !(p = queue_take(FRAME_HEADER + length + FRAME_TRAILER)))
		return false;
	put_u32(p + FRAME_HEADER + length, frame_header(p, FRAME_DATA, stream, offset, (uint32_t)length));
	memcpy(p + FRAME_HEADER, pieces[0].iov_base, first);
	if (length > first)
		memcpy(p + FRAME_HEADER + first, pieces[1].iov_base, length - first);
	if (queue.end - queue.start >= FLUSH_AT)
		channel_flush();
	return true;
}

void channel_flush(void)
{
	while (writable && port_out.fd >= 0 && queue.end > queue.start) {
		ssize_t n = write(port_out.fd, queue.data + queue.start, queue.end - queue.start);
		if (n > 0) {
			queue.start += (size_t)n;
			if (queue.start == queue.end)
				queue_clear();
		} else if (n >= 0 || errno != EINTR) {
			writable = false;
			/* A broken socket is noticed by the reader; a port without a host takes nothing until there is one. */
			if (n < 0 && errno != EAGAIN && agent.mode == MODE_STDIO)
				agent.leaving = true;
		}
	}
}

/* ---- in -------------------------------------------------------------------------------------------------------------------------- */

static void synchronise(const uint8_t preamble[PREAMBLE_SIZE])
{
	queue_clear();
	processes_detach_all();
	synced = true;
	greeted = false;
	channel_generation++;
	memcpy(queue_take(PREAMBLE_SIZE), preamble, PREAMBLE_SIZE);
}

static void greet(const struct frame *f)
{
	static uint8_t buffer[PAYLOAD_MAX];
	struct mp hello;
	uint64_t lowest = 1, highest = 1;
	if (mp_open(f->payload, f->length, &hello)) {
		lowest = mp_u64_or(&hello, "min", 1, UINT32_MAX);
		highest = mp_u64_or(&hello, "max", 1, UINT32_MAX);
	}
	bool common = lowest <= PROTOCOL_VERSION && PROTOCOL_VERSION <= highest;
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	describe_agent(&w, common ? PROTOCOL_VERSION : 0);
	greeted = true;
	channel_send(FRAME_WELCOME, 0, 0, buffer, w.length);
}

/* True: something was parsed, and there may be more. */
static bool parse_one(void)
{
	struct frame f;
	uint8_t preamble[PREAMBLE_SIZE];
	switch (parser_next(&parser, &f, preamble)) {
	case PARSED_NOTHING:
		return false;
	case PARSED_PREAMBLE:
		synchronise(preamble);
		return true;
	case PARSED_DAMAGE:
		synced = greeted = false;
		processes_detach_all();
		return true;
	case PARSED_FRAME:
		break;
	}
	if (f.type == FRAME_HELLO)
		greet(&f);
	else if (f.type == FRAME_PING)
		channel_send(FRAME_PONG, 0, 0, f.payload, f.length < PING_MAX ? f.length : PING_MAX);
	else if (greeted)
		handle_frame(&f);
	return true;
}

static bool parse_all(void)
{
	while (!held && queue_free() >= REPLY_ROOM + PING_MAX + 64)
		if (!parse_one())
			return true;
	channel_flush();
	return false;
}

/* A virtio port hands over one host buffer of at most a page for each read, and readv is a loop over reads that ends at the
 * first short one: page-sized pieces take several buffers with one system call. */
static ssize_t read_port(void)
{
	enum { PIECES = 16, PIECE = 4096 };
	struct iovec iov[PIECES];
	size_t room;
	uint8_t *at = parser_space(&parser, &room);
	int n = 0;
	for (; n < PIECES && room >= PIECE; n++, at += PIECE, room -= PIECE)
		iov[n] = (struct iovec){at, PIECE};
	return readv(port_in.fd, iov, n);
}

bool channel_work(void)
{
	/* Whole rounds of the loop in between, so that a flood of input does not starve the output. */
	if (port_in.fd < 0 || held)
		return false;
	bool parsed = parse_all();
	if (held)
		return false;
	if (!readable || !parsed)
		return !parsed && writable;
	ssize_t n = read_port();
	if (n > 0) {
		parser_added(&parser, (size_t)n);
		parse_all();
		return true;
	}
	if (n == 0)
		host_gone();
	else if (errno != EINTR)
		readable = false;
	if (n < 0 && errno != EAGAIN && errno != EINTR)
		host_gone();
	return false;
}
