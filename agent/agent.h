/* What the parts of the agent share. One thread, one instance: the state is global, and each file owns its part of it. */
#ifndef STOKER_AGENT_H
#define STOKER_AGENT_H

#include "frame.h"
#include "msgpack.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/uio.h>

#define AGENT_VERSION "0.1.0"

enum {
	PROTOCOL_VERSION = 1,
	PROCESSES_RUNNING = 4096,
	PROCESSES_ENDED = 1024,
	ENDED_RINGS = 64 << 20,
	RING_DEFAULT = 1 << 20,
	RING_SMALLEST = 4096,
	RING_LARGEST = 8 << 20,
	STDIN_BUFFER = 256 << 10,
	QUIET_MS = 250,     /* a pipe held by a descendant is given up after this long without a byte */
	TAG_MAX = 128,
	ARGUMENTS = 16384,  /* argv and environment, each */
	PAGE_OF_PROCESSES = 256,
	NAME_ROOM = 64,
	PATH_ROOM = 4096,
	NGROUPS_ROOM = 256,
	CONNECTION_FIRST = 1 << 27, /* ids from here on are those of connections */
};

/* ---- text.c ----------------------------------------------------------------------------------------------------------------------- */

size_t text_formatv(char *buffer, size_t size, const char *format, va_list args);
size_t text_format(char *buffer, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
uint64_t text_number(const char *s, char **end); /* digits behind blanks, decimal; what is too large is the largest */
char *text_find(const char *s, const char *word);
void text_complain(const char *format, ...) __attribute__((format(printf, 1, 2))); /* to standard error */

/* ---- agent.c: modes, the event loop ------------------------------------------------------------------------------------ */

/* Embedded in whatever owns a descriptor in the epoll set. Descriptors are watched edge-triggered: a disconnected virtio
 * port reports a hang-up all the time. */
struct watch {
	void (*ready)(struct watch *w, uint32_t events);
	int fd;
};

enum mode { MODE_INIT, MODE_SOCKET, MODE_STDIO };

struct agent {
	enum mode mode;
	bool debug;
	bool prepared; /* the root is mounted; `configure` still has to say whose machine this is */
	bool configured;
	bool leaving; /* the loop ends (never as PID 1) */
	bool beside;  /* the image's own init is PID 1, and we are a child of it */
	char *name;   /* argv[0], to be written to */
	uint64_t started_us, ready_us; /* since the boot */
};
extern struct agent agent;

uint64_t now_ns(void);
uint64_t since_boot_us(void);
void signals_watch(void);          /* (again after a fork: a signalfd in an epoll set is its first owner's) */
void limits_restore(void);
bool watch_add(struct watch *w, uint32_t events);
void watch_close(struct watch *w); /* closes the descriptor, which also leaves the epoll set */
void wake_at(uint64_t ns);         /* the loop runs again at the latest then */
void logf_host(const char *level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- channel.c: the byte stream to the host --------------------------------------------------------------------------------- */

extern uint64_t channel_generation;
void channel_open(int in, int out);  /* in == out, but for --stdio */
void channel_listen(int fd);         /* a listening socket: one connection at a time, the newest wins */
bool channel_work(void);             /* reads and handles; true: there is more to do at once */
void channel_flush(void);
bool channel_synced(void);
void channel_hold(bool on); /* nothing more is read from the host for a while */
/* Queues a frame by copy. False: no room now (never for a reply: parsing stops while the queue is long). */
bool channel_send(uint8_t type, uint32_t channel, uint64_t offset, const void *payload, size_t length);
/* The same for DATA out of a ring, in at most two pieces. False: no room now. */
bool channel_send_ring(uint32_t stream, uint64_t offset, const struct iovec pieces[2]);
bool channel_can_send(void); /* room for a largest DATA frame */

/* ---- calls.c: methods ---------------------------------------------------------------------------------------------------------- */

void handle_frame(const struct frame *f);
void reply(uint32_t request, const struct mp_writer *w);
void reply_error(uint32_t request, const char *code, int error, const char *format, ...) __attribute__((format(printf, 4, 5)));
void reply_empty(uint32_t request);
void mpw_clean(struct mp_writer *w, const char *s); /* a str whatever the bytes are: what is not UTF-8 becomes '?' */
void describe_agent(struct mp_writer *w, uint32_t version);

/* How long the parts of a call took: told in its answer. */
struct laps {
	struct {
		const char *name;
		uint64_t us;
	} list[16];
	unsigned count;
	uint64_t since;
};
void laps_begin(struct laps *l);
void lap(struct laps *l, const char *name);
void laps_write(struct mp_writer *w, const struct laps *l); /* key `steps` and its map */

/* ---- process.c, streams.c ---------------------------------------------------------------------------------------------------------- */

struct process;

struct output {
	struct watch watch;
	struct process *process;
	uint32_t stream;
	uint32_t size;   /* of the ring, a power of two */
	uint8_t *ring;   /* NULL until there is a first byte */
	uint64_t head, acked, sent, window;
	uint64_t last_ns; /* when something was read, for the quiet rule */
	bool open, readable, attached, eof_sent, enlarged;
};

struct input {
	struct watch watch;
	struct process *process;
	uint8_t *ring;         /* STDIN_BUFFER bytes; NULL until the pipe refuses something */
	uint64_t wanted;       /* everything before it was received */
	uint64_t taken, acked; /* ... was taken by the pipe; ... was acknowledged */
	bool open, writable, eof, gone, gone_told, enlarged;
	uint64_t eof_at;
};

struct process {
	uint32_t id;
	pid_t pid;
	bool running;  /* not yet reaped */
	bool finished; /* reaped, and both outputs are complete */
	bool pty, discard, busy, exit_sent, oom, builtin;
	bool dropped; /* forgotten; freed at the end of the round */
	bool connecting;  /* not connected yet; `request` waits for it */
	uint32_t request;
	int status;
	struct rusage usage;
	uint64_t started_ns, ended_ns;
	struct input in;
	struct output out, err;
	struct process *next, *previous;               /* all, ascending by id */
	struct process *next_busy, *next_id, *next_pid;
	struct process *next_ended, *previous_ended;
	size_t held; /* bytes of rings, once ended */
	char tag[TAG_MAX + 1];
};

extern struct process *processes_first;
extern unsigned processes_running;
struct process *process_find(uint32_t id);
struct process *process_new(uint32_t id);
void process_started(struct process *p, pid_t pid);
void process_drop(struct process *p); /* forget: frees everything, in the next round of the loop */
void processes_reap(void);
bool processes_work(void);
void processes_swept(void);  /* end of a round: frees the dropped ones */
void processes_detach_all(void);
void process_busy(struct process *p);
void process_describe(struct mp_writer *w, const struct process *p, bool whole);
void process_attach(struct process *p, const uint64_t *out, const uint64_t *err);
int process_signal(struct process *p, int number, bool group);
int process_resize(struct process *p, unsigned rows, unsigned columns);
bool processes_left(void); /* any child at all? reaps */

/* ---- connect.c ------------------------------------------------------------------------------------------------------------------------ */

static inline bool is_connection(const struct process *p)
{
	return p->id >= CONNECTION_FIRST;
}
void call_connect(uint32_t request, const struct mp *m);
bool connection_made(struct process *p); /* false: not yet, or it was refused and is dropped */
unsigned connections_sweep(bool all);    /* drops those that nobody attached since the last synchronisation, or all; how many are left */

void output_init(struct output *o, struct process *p, uint32_t stream, int fd, uint32_t size);
bool output_read(struct output *o); /* true: call again */
bool output_send(struct output *o); /* true: call again */
void output_close(struct output *o);
uint64_t output_oldest(const struct output *o);
void output_acked(struct output *o, uint64_t offset);
void output_attach(struct output *o, const uint64_t *offset);
void output_free(struct output *o);
void input_init(struct input *i, struct process *p, int fd);
void input_data(struct input *i, uint64_t offset, const uint8_t *data, size_t length);
void input_eof(struct input *i, uint64_t offset);
void input_work(struct input *i);
void input_close(struct input *i);
void input_free(struct input *i);

/* ---- exec.c, launch.c, users.c ------------------------------------------------------------------------------------------------------- */

struct account {
	uid_t uid;
	gid_t gid;
	bool known; /* has a line in /etc/passwd */
	char name[NAME_ROOM], home[PATH_ROOM / 4], shell[PATH_ROOM / 4];
	gid_t groups[NGROUPS_ROOM];
	unsigned group_count;
};

/* "name", "uid", "name:group", "uid:gid"; an empty spec is root. NULL, or the code of the error. */
const char *account_resolve(const char *spec, struct account *a);
/* The same by number, for files.c ("~user", and names in listings). */
bool account_home(const char *name, char *home, size_t size);
const char *account_name(uint32_t id, bool group); /* empty when it has none */

struct limit {
	int resource;
	struct rlimit value;
};

/* Everything a child needs, made ready by the parent: between clone and exec only system calls happen. */
struct launch {
	char **argv; /* with one free slot in front, for /bin/sh */
	char **environment;
	const char *search; /* PATH */
	const char *workdir, *cwd; /* or NULL; cwd may be relative to workdir */
	const struct account *account;
	const struct limit *limits;
	unsigned limit_count;
	mode_t mask;
	int in, out, err; /* the child's ends */
	bool tty;
	/* Written by the child, which shares the memory. */
	const char *stage;
	int error;
	const char *tried;
};

bool launch_prepare(struct launch *l); /* in the child */
int launch_run(void *launch);          /* in the child: prepare and exec */
void close_inherited(int keep);        /* in a child that executes nothing: every descriptor above 2 but this one (-1: none) */
/* Starts the program and waits until it runs or has failed: the pid, or -1 with stage and error set. */
pid_t launch_start(struct launch *l);

void call_exec(uint32_t request, const struct mp *m);
/* The child of an applet: `directory` is the working directory that could not be entered, or NULL. Returns the exit code. */
int applet_main(char **argv, const struct mp *args, const char *directory, int error, const struct account *a);

/* ---- setup.c, identity.c, handover.c, mounts.c, network.c, boot.c, info.c, power.c ----------------------------------------------------------------------------------------- */

extern struct mp configured_env;
extern char configured_user[2 * NAME_ROOM], configured_workdir[PATH_ROOM];

struct failure {
	const char *code;
	int error;
	char message[256];
};
bool fail(struct failure *f, const char *code, int error, const char *format, ...) __attribute__((format(printf, 4, 5)));

void call_prepare(uint32_t request, const struct mp *m);
void call_configure(uint32_t request, const struct mp *m);
bool defaults_keep(const struct mp *m, struct failure *f);

bool set_realtime(const struct mp *v);
uint64_t realtime_ns(void);
bool add_entropy(const struct mp *bytes);
/* Host name, hosts, resolv.conf. In a copy only what is named changes. */
bool names_set(const struct mp *m, bool copy, struct failure *f);
/* Files of ours, in memory, over those of the image: to name a machine writes no disk then, and nothing of it is in its disk. */
void names_prepare(void);
const char *boot_id(void);
void boot_id_prepare(void); /* the same for the boot id, which is another one for each copy */
bool boot_id_set(const char *given); /* NULL: one of its own */
bool generation_write(uint64_t generation);
bool machine_id_known(void);
bool machine_id_set(const char *id);
bool sshd_installed(void);
bool host_keys_write(const struct mp *keys, struct failure *f);
bool host_keys_wanted(const struct mp *m);
void host_keys_list(struct mp_writer *w); /* a pair of a map */
unsigned host_keys(const struct mp *keep, bool remove); /* how many files there are besides those to keep */
bool machine_id_and_keys(const struct mp *m, struct failure *f);

void boot(void);  /* PID 1: mounts, modules; returns with the channel open */
bool modules_load(const char *name, int *error);
bool modules_load_later(const char *name, int *error);
void fatal(const char *code, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
void mount_rest(bool tmpfs_tmp);
void root_empty(int old_root);
bool mount_over(const char *source, const char *target, const char *type, unsigned long flags, const char *options);
extern bool network_modules_pending;
void modules_load_network(void);

unsigned long mount_flags(const struct mp *names);
void mount_grow(const char *device, const char *path); /* the mounted file system, to its device */
int mount_enlarge(const char *device, const char *path, uint64_t *size); /* the same; an errno (0: done), and the device's bytes */
bool mount_wait(const char *device);
bool mount_disk(const char *device, const char *path, const char *type, const struct mp *flags, char *options);
bool mount_find(const char *serial, char *device, size_t size); /* the disk with this serial number as /dev/NAME */
bool mount_all(const struct mp *mounts, struct failure *f);

struct mount_line {
	char *source, *target, *type;
};
unsigned mount_lines(struct mount_line *lines, unsigned most); /* of /proc/self/mounts, good until the next call */

bool network_loopback(void);
bool network_configure(const struct mp *network, struct failure *f);
bool network_change(const struct mp *network, struct failure *f); /* the same, where there is another one */

/* Gives process 1 to the image's /sbin/init. True in the child that goes on as the agent; false: nothing was handed over. */
bool hand_over(struct failure *f);
void init_ask(bool reboot_it); /* for a shutdown */

/* ---- copies.c, hooks.c, quiet.c, connections.c ----------------------------------------------------------------------------------------- */

void call_before_snapshot(uint32_t request, const struct mp *m);
void call_after_snapshot(uint32_t request);
void call_after_restore(uint32_t request, const struct mp *m);
bool copies_work(void);
void report_hazard(const char *name, bool handled, const char *format, ...) __attribute__((format(printf, 3, 4)));
void report_hazard_named(const char *before, const char *name, bool handled, const char *format, ...) __attribute__((format(printf, 4, 5)));

/* DIRECTORY/KIND: false when there is nothing to run. Then hooks_work runs them; false: all have ended. */
bool hooks_begin(const char *directory, const char *kind, uint64_t limit_ms);
bool hooks_work(void);
void hooks_ended(pid_t pid, int status);
void hooks_abandon(void);

/* What the child that makes a machine quiet tells its parent. */
struct quiet_result {
	uint64_t sync_us, drop_us, freeze_us, zeroed, left;
	int drop_error, freeze_error;
	unsigned frozen;
	char where[64];
};
void quiet_child(bool freeze, bool drop, int report) __attribute__((noreturn));
unsigned quiet_thaw(void);

/* The guest's other processes. */
struct others {
	unsigned count, dropped, reloaded;
	int error; /* why a connection is still there */
	char names[160];
};
void others_prepare(void);
void others_visit(bool connections, bool sshd, struct others *o);

/* ---- info.c, power.c ------------------------------------------------------------------------------------------------------------------ */

void call_info(uint32_t request);
void call_sync(uint32_t request);
void call_shutdown(uint32_t request, const struct mp *m);
bool power_work(void);
void power_request(bool reboot_it, uint64_t grace_ms);
void power_sync_ended(pid_t pid);
void power_off_now(bool reboot_it) __attribute__((noreturn));

size_t read_small(const char *path, char *buffer, size_t size); /* NUL-terminated; 0 when unreadable */

#endif
