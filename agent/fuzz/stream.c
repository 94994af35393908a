/* A whole agent, fed by a host that says anything: every call, streams of processes that seem to exist, damage in between.
 *
 * Input: records of type, channel, offset and length (1, 1, 2, 2 bytes) and a payload, which are made into good frames; type 0xff
 * sends its payload as it is, 0xfe is a new synchronisation. Channels from 0xc0 on are the streams of connections. */
#include "under.h"

#include "../calls.c"
#include "../exec.c"
#include "../frame.c"
#include "../info.c"
#include "../msgpack.c"
#define address fuzz_address
#include "../network.c"
#undef address
#define stage power_stage
#include "../power.c"
#undef stage
#define last process_last
#include "../process.c"
#undef last
#define finish input_finish
#include "../streams.c"
#undef finish
#define number users_number
#define copy users_copy
#include "../users.c"
#undef number
#undef copy
#define put text_put
#include "../text.c"
#undef put
#include "../setup.c"
#define put identity_put
#define add identity_add
#define text identity_text
#include "../identity.c"
#undef put
#undef add
#undef text
#define stage copies_stage
#define buffer copies_buffer
#define finish copies_finish
#include "../copies.c"
#undef stage
#undef buffer
#undef finish
/* A connection leads to an end of a pair: the other end has said something, and may have gone. */
static int fuzz_socket(void)
{
	int pair[2];
	static unsigned turn;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair))
		return -1;
	if (write(pair[1], "answer", 6) != 6)
		abort();
	static int open_end = -1;
	if (open_end >= 0)
		close(open_end);
	open_end = ++turn % 2 ? pair[1] : (close(pair[1]), -1);
	return pair[0];
}
#define socket(...) fuzz_socket()
#define connect(...) 0
#include "../connect.c"
#undef socket
#undef connect
#include "../channel.c"

struct agent agent = {.mode = MODE_SOCKET};
bool network_modules_pending;
static uint64_t now = 1000000000;
static pid_t next_pid = 1 << 23;

uint64_t now_ns(void) { return now += 1000000; }
uint64_t since_boot_us(void) { return 1; }
bool watch_add(struct watch *w, uint32_t events) { (void)w; (void)events; return true; }
void watch_close(struct watch *w)
{
	if (w->fd >= 0)
		close(w->fd);
	w->fd = -1;
}
void wake_at(uint64_t ns) { (void)ns; }
void logf_host(const char *level, const char *format, ...) { (void)level; (void)format; }
size_t read_small(const char *path, char *buffer, size_t size)
{
	(void)path;
	memset(buffer, '1', size - 1);
	buffer[size - 1] = 0;
	return size - 1;
}
bool modules_load(const char *name, int *error) { (void)name; *error = ENOENT; return false; }
bool modules_load_later(const char *name, int *error) { (void)name; *error = ENOENT; return false; }
void modules_load_network(void) {}
void mount_rest(bool tmpfs_tmp) { (void)tmpfs_tmp; }
void root_empty(int old_root) { (void)old_root; }
bool mount_wait(const char *device) { (void)device; abort(); }
bool mount_disk(const char *device, const char *path, const char *type, const struct mp *flags, char *options)
{
	(void)device, (void)path, (void)type, (void)flags, (void)options;
	errno = EPERM;
	return false;
}
void mount_grow(const char *device, const char *path) { (void)device; (void)path; abort(); }
bool mount_find(const char *serial, char *device, size_t size) { (void)serial; (void)device; (void)size; return false; }
int mount_enlarge(const char *device, const char *path, uint64_t *size) { (void)device; (void)path; *size = 0; return ENODEV; }
bool mount_all(const struct mp *mounts, struct failure *f) { (void)mounts; (void)f; abort(); }
unsigned mount_lines(struct mount_line *lines, unsigned most) { (void)lines; (void)most; return 0; }
bool hooks_begin(const char *directory, const char *kind, uint64_t limit_ms) { (void)directory; (void)kind; (void)limit_ms; return false; }
bool hooks_work(void) { return false; }
void hooks_ended(pid_t pid, int status) { (void)pid; (void)status; }
void hooks_abandon(void) {}
void quiet_child(bool freeze, bool drop, int report_to) { (void)freeze; (void)drop; (void)report_to; abort(); }
unsigned quiet_thaw(void) { return 0; }
void others_prepare(void) { abort(); }
void others_visit(bool connections, bool sshd, struct others *o) { (void)connections; (void)sshd; (void)o; abort(); }
bool hand_over(struct failure *f) { (void)f; abort(); }
void init_ask(bool again) { (void)again; abort(); }
int applet_main(char **argv, const struct mp *args, const char *directory, int error, const struct account *a)
{
	(void)argv; (void)args; (void)directory; (void)error; (void)a;
	abort();
}
bool launch_prepare(struct launch *l) { (void)l; return false; }
pid_t launch_start(struct launch *l)
{
	/* Everything a child would use is touched. */
	size_t n = strlen(l->search);
	for (char **at = l->argv; *at; at++)
		n += strlen(*at);
	for (char **at = l->environment; *at; at++)
		n += strlen(*at);
	n += (l->cwd ? strlen(l->cwd) : 0) + (l->workdir ? strlen(l->workdir) : 0) + l->limit_count;
	if (n % 5 == 0) {
		l->stage = n % 2 ? "exec" : "directory";
		l->error = ENOENT;
		if (!l->cwd && !l->workdir)
			l->stage = "exec";
		return -1;
	}
	if (write(l->out, "some output\n", 12) != 12)
		abort();
	return next_pid++;
}

static void feed(const void *data, size_t n)
{
	const uint8_t *p = data;
	while (n) {
		size_t room;
		uint8_t *to = parser_space(&parser, &room);
		size_t part = n < room ? n : room;
		if (!part)
			abort();
		memcpy(to, p, part);
		parser_added(&parser, part);
		p += part;
		n -= part;
		while (!parse_all())
			queue_clear(); /* the host reads everything */
		queue_clear();
	}
}

static void turn(void)
{
	for (struct process *p = processes_first; p; p = p->next)
		p->out.readable = p->err.readable = p->in.writable = true;
	processes_work();
	queue_clear();
	processes_swept();
}

static void synchronise_again(void)
{
	uint8_t preamble[PREAMBLE_SIZE] = {0xf5, 'S', 'T', 'O', 'K', 'E', 'R', '-', 'S', 'Y', 'N', 'C', '\r', '\n', 0x1a, '\n'};
	uint8_t header[FRAME_HEADER], trailer[4];
	put_u32(preamble + 32, crc32_of(preamble, 32));
	put_u32(trailer, frame_header(header, FRAME_HELLO, 0, 0, 0));
	feed(preamble, sizeof preamble);
	feed(header, sizeof header);
	feed(trailer, sizeof trailer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	parser_reset(&parser);
	queue_clear();
	agent.configured = false;
	configured_env = (struct mp){.type = MP_MISSING};
	configured_user[0] = configured_workdir[0] = 0;
	power_stage = RUNNING;
	writable = false;
	signal(SIGPIPE, SIG_IGN); /* standard input of a child that is none */
	synchronise_again();
	while (size >= 6) {
		uint8_t header[FRAME_HEADER], trailer[4];
		size_t n = (size_t)(data[4] | data[5] << 8);
		const uint8_t *head = data;
		data += 6;
		size -= 6;
		if (n > size)
			n = size;
		if (head[0] == 0xff) {
			feed(data, n);
		} else if (head[0] == 0xfe) {
			synchronise_again();
		} else {
			put_u32(trailer, frame_header(header, head[0], head[1] < 0xc0 ? head[1] : 4u * CONNECTION_FIRST + head[1] - 0xc0, (uint64_t)(head[2] | head[3] << 8), (uint32_t)n));
			feed(header, sizeof header);
			feed(data, n);
			feed(trailer, sizeof trailer);
		}
		if (head[0] == 0xfd && processes_first && processes_first->running && !is_connection(processes_first)) {
			struct process *p = processes_first;
			forget_pid(p);
			p->running = false;
			processes_running--;
			process_busy(p);
		}
		turn();
		data += n;
		size -= n;
	}
	for (struct process *p = processes_first, *next; p; p = next) {
		next = p->next;
		if (p->running && !is_connection(p)) {
			forget_pid(p);
			p->running = false;
			processes_running--;
		}
		process_drop(p);
	}
	processes_swept();
	return 0;
}
