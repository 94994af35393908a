/* Calls from the host, and how they are answered. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

static bool utf8(const uint8_t *s, size_t n)
{
	while (n) {
		unsigned more = *s < 0x80 ? 0 : *s >= 0xc2 && *s < 0xe0 ? 1 : *s >= 0xe0 && *s < 0xf0 ? 2 : *s >= 0xf0 && *s < 0xf5 ? 3 : 9;
		if (more >= n || (*s == 0xe0 && s[1] < 0xa0) || (*s == 0xed && s[1] > 0x9f) || (*s == 0xf0 && s[1] < 0x90) ||
		    (*s == 0xf4 && s[1] > 0x8f))
			return false;
		for (unsigned i = 1; i <= more; i++)
			if ((s[i] & 0xc0) != 0x80)
				return false;
		s += more + 1;
		n -= more + 1;
	}
	return true;
}

void mpw_clean(struct mp_writer *w, const char *s)
{
	size_t n = strlen(s);
	mpw_strn(w, s, n);
	if (!w->full && !utf8((const uint8_t *)s, n))
		for (size_t i = w->length - n; i < w->length; i++)
			if (w->data[i] & 0x80)
				w->data[i] = '?';
}

void reply(uint32_t request, const struct mp_writer *w)
{
	if (w->full)
		reply_error(request, "io", EMSGSIZE, "the answer is too long");
	else
		channel_send(FRAME_REPLY, request, 0, w->data, w->length);
}

void reply_empty(uint32_t request)
{
	static const uint8_t empty = 0x80;
	channel_send(FRAME_REPLY, request, 0, &empty, 1);
}

void reply_error(uint32_t request, const char *code, int error, const char *format, ...)
{
	char text[512];
	uint8_t buffer[768];
	struct mp_writer w;
	va_list args;
	va_start(args, format);
	text_formatv(text, sizeof text, format, args);
	va_end(args);
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 1);
	mpw_str(&w, "error");
	mpw_map(&w, 3);
	mpw_key_str(&w, "code", code);
	mpw_str(&w, "message");
	mpw_clean(&w, text);
	mpw_key_uint(&w, "errno", (uint64_t)error);
	channel_send(FRAME_REPLY, request, 0, buffer, w.length);
}

bool fail(struct failure *f, const char *code, int error, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	text_formatv(f->message, sizeof f->message, format, args);
	va_end(args);
	f->code = code;
	f->error = error;
	return false;
}

void laps_begin(struct laps *l)
{
	l->count = 0;
	l->since = now_ns();
}

void lap(struct laps *l, const char *name)
{
	uint64_t now = now_ns();
	if (l->count < sizeof l->list / sizeof *l->list) {
		l->list[l->count].name = name;
		l->list[l->count++].us = (now - l->since) / 1000;
	}
	l->since = now;
}

void laps_write(struct mp_writer *w, const struct laps *l)
{
	mpw_str(w, "steps");
	mpw_map(w, l->count);
	for (unsigned i = 0; i < l->count; i++)
		mpw_key_uint(w, l->list[i].name, l->list[i].us);
}

/* At most PAGE_OF_PROCESSES with an id above `after`; true when there are more. */
static bool describe_page(struct mp_writer *w, uint32_t after)
{
	size_t mark = mpw_open_array(w);
	uint32_t n = 0;
	struct process *p = processes_first;
	while (p && p->id <= after)
		p = p->next;
	for (; p && !is_connection(p) && n < PAGE_OF_PROCESSES; p = p->next, n++)
		process_describe(w, p, false);
	mpw_close(w, mark, n);
	return p && !is_connection(p);
}

void describe_agent(struct mp_writer *w, uint32_t version)
{
	struct utsname u;
	uname(&u);
	mpw_map(w, 11);
	mpw_key_uint(w, "version", version);
	mpw_key_str(w, "agent", AGENT_VERSION);
	mpw_key_str(w, "state", agent.configured ? "ready" : agent.prepared ? "prepared" : "initramfs");
	mpw_key_str(w, "kernel", u.release);
	mpw_key_str(w, "boot_id", boot_id());
	mpw_key_uint(w, "pid", (uint64_t)getpid());
	mpw_key_uint(w, "started_us", agent.started_us);
	mpw_key_uint(w, "ready_us", agent.ready_us);
	mpw_key_uint(w, "generation", channel_generation);
	mpw_str(w, "processes");
	bool more = describe_page(w, 0);
	mpw_key_bool(w, "more", more);
}

static void call_processes(uint32_t request, const struct mp *m)
{
	static uint8_t buffer[PAYLOAD_MAX];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 2);
	mpw_str(&w, "processes");
	bool more = describe_page(&w, (uint32_t)mp_u64_or(m, "after", 0, UINT32_MAX));
	mpw_key_bool(&w, "more", more);
	reply(request, &w);
}

static void call_attach(uint32_t request, const struct mp *m, struct process *p)
{
	uint64_t out, err;
	struct mp o = mp_get(m, "out"), e = mp_get(m, "err");
	uint8_t buffer[1024];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	process_describe(&w, p, true);
	reply(request, &w);
	process_attach(p, mp_u64(&o, &out) ? &out : NULL, mp_u64(&e, &err) ? &err : NULL);
}

static void call_stream(uint32_t request, const struct mp *m, struct process *p)
{
	struct mp mode = mp_get(m, "mode"), window = mp_get(m, "window");
	uint64_t bytes;
	if (mp_is_text(&mode)) {
		if (!mp_text_is(&mode, "block") && !mp_text_is(&mode, "discard")) {
			reply_error(request, "bad_request", EINVAL, "mode is block or discard");
			return;
		}
		p->discard = mp_text_is(&mode, "discard");
	}
	if (mp_u64(&window, &bytes))
		p->out.window = p->err.window = bytes;
	process_busy(p);
	reply_empty(request);
}

static void call_signal(uint32_t request, const struct mp *m, struct process *p)
{
	uint64_t number = mp_u64_or(m, "signal", 0, UINT32_MAX);
	if (number < 1 || number > 64) {
		reply_error(request, "bad_request", EINVAL, "no such signal");
		return;
	}
	int error = process_signal(p, (int)number, mp_bool_or(m, "group", true));
	if (error)
		reply_error(request, error == ESRCH ? "not_found" : "io", error, error == ESRCH ? "the process has ended" : "%s", strerror(error));
	else
		reply_empty(request);
}

static void call_resize(uint32_t request, const struct mp *m, struct process *p)
{
	int error = process_resize(p, (unsigned)mp_u64_or(m, "rows", 24, 65535), (unsigned)mp_u64_or(m, "cols", 80, 65535));
	if (error)
		reply_error(request, error == ENOTTY ? "bad_request" : "io", error, error == ENOTTY ? "not a terminal" : "%s", strerror(error));
	else
		reply_empty(request);
}

static void call_detach(uint32_t request, struct process *p)
{
	p->out.attached = p->err.attached = false;
	reply_empty(request);
}

static void call_forget(uint32_t request, struct process *p)
{
	if (!p->finished && !is_connection(p)) {
		reply_error(request, "bad_request", EBUSY, "process %u is still running", p->id);
		return;
	}
	process_drop(p);
	reply_empty(request);
}

/* Methods about one process, which `id` names. False: it is not one of them. */
static bool call_about_process(uint32_t request, const struct mp *method, const struct mp *m)
{
	static const char *const names[] = {"attach", "stream", "signal", "resize", "detach", "forget"};
	unsigned which = 0;
	while (which < 6 && !mp_text_is(method, names[which]))
		which++;
	if (which == 6)
		return false;
	uint64_t id = mp_u64_or(m, "id", 0, UINT32_MAX);
	struct process *p = process_find((uint32_t)id);
	if (!p) {
		reply_error(request, "not_found", ESRCH, "no process %u", (unsigned)id);
		return true;
	}
	switch (which) {
	case 0: call_attach(request, m, p); break;
	case 1: call_stream(request, m, p); break;
	case 2: call_signal(request, m, p); break;
	case 3: call_resize(request, m, p); break;
	case 4: call_detach(request, p); break;
	default: call_forget(request, p);
	}
	return true;
}

static void call_flag(uint32_t request, bool ok, const char *message)
{
	if (ok)
		reply_empty(request);
	else
		reply_error(request, errno == EINVAL ? "bad_request" : "io", errno, "%s: %s", message, strerror(errno));
}

/* Answers what size the device has by now: the host waits until it is the new one. */
static void call_grow(uint32_t request, const struct mp *m)
{
	char serial[32] = "", device[256] = "", path[PATH_ROOM] = "/";
	struct mp n = mp_get(m, "serial"), d = mp_get(m, "device"), p = mp_get(m, "path");
	uint8_t buffer[64];
	struct mp_writer w;
	uint64_t bytes;
	if ((mp_is_text(&n) && !mp_copy(&n, serial, sizeof serial)) || (mp_is_text(&d) && !mp_copy(&d, device, sizeof device)) ||
	    !*serial == !*device || (*device && *device != '/') || (mp_is_text(&p) && !mp_copy(&p, path, sizeof path))) {
		reply_error(request, "bad_request", EINVAL, "serial or device, and path");
		return;
	}
	int error = *serial && !mount_find(serial, device, sizeof device) ? ENODEV : mount_enlarge(device, path, &bytes);
	if (error) {
		reply_error(request, "io", error, "cannot grow the file system of %s at %.100s: %s", *serial ? serial : device, path,
			    strerror(error));
		return;
	}
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 1);
	mpw_key_uint(&w, "device", bytes);
	reply(request, &w);
}

/* Sets the clock, if it is told a time, and answers what it said before. */
static void call_time(uint32_t request, const struct mp *m)
{
	struct mp t = mp_get(m, "realtime");
	uint8_t buffer[64];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 1);
	mpw_key_uint(&w, "realtime", realtime_ns());
	if (t.type != MP_MISSING && !set_realtime(&t))
		call_flag(request, false, "the clock");
	else
		reply(request, &w);
}

static void handle_call(const struct frame *f)
{
	struct mp m;
	uint32_t r = f->channel;
	if (!mp_open(f->payload, f->length, &m) || m.type != MP_MAP) {
		reply_error(r, "bad_request", EBADMSG, "not a msgpack map");
		return;
	}
	struct mp method = mp_get(&m, "m");
	if (!mp_is_text(&method)) {
		reply_error(r, "bad_request", EBADMSG, "no method");
	} else if (mp_text_is(&method, "exec")) {
		call_exec(r, &m);
	} else if (call_about_process(r, &method, &m)) {
		;
	} else if (mp_text_is(&method, "connect")) {
		call_connect(r, &m);
	} else if (mp_text_is(&method, "prepare")) {
		call_prepare(r, &m);
	} else if (mp_text_is(&method, "configure")) {
		call_configure(r, &m);
	} else if (mp_text_is(&method, "processes")) {
		call_processes(r, &m);
	} else if (mp_text_is(&method, "info")) {
		call_info(r);
	} else if (mp_text_is(&method, "sync")) {
		call_sync(r);
	} else if (mp_text_is(&method, "grow")) {
		call_grow(r, &m);
	} else if (mp_text_is(&method, "shutdown")) {
		call_shutdown(r, &m);
	} else if (mp_text_is(&method, "before_snapshot")) {
		call_before_snapshot(r, &m);
	} else if (mp_text_is(&method, "after_snapshot")) {
		call_after_snapshot(r);
	} else if (mp_text_is(&method, "after_restore")) {
		call_after_restore(r, &m);
	} else if (mp_text_is(&method, "time")) {
		call_time(r, &m);
	} else if (mp_text_is(&method, "reseed")) {
		struct mp bytes = mp_get(&m, "entropy");
		call_flag(r, add_entropy(&bytes), "the entropy pool");
	} else {
		char name[NAME_ROOM];
		reply_error(r, "unsupported", ENOSYS, "unknown method %s", mp_copy(&method, name, sizeof name) ? name : "");
	}
}

static void handle_stream(const struct frame *f)
{
	struct process *p = process_find(f->channel / 4);
	unsigned which = f->channel % 4;
	if (!p || which > 2)
		return; /* ended and forgotten meanwhile */
	if (which == 0 && f->type == FRAME_DATA)
		input_data(&p->in, f->offset, f->payload, f->length);
	else if (which == 0 && f->type == FRAME_EOF)
		input_eof(&p->in, f->offset);
	else if (which != 0 && f->type == FRAME_ACK)
		output_acked(which == 1 ? &p->out : &p->err, f->offset);
}

void handle_frame(const struct frame *f)
{
	switch (f->type) {
	case FRAME_CALL:
		handle_call(f);
		break;
	case FRAME_DATA:
	case FRAME_EOF:
	case FRAME_ACK:
		handle_stream(f);
		break;
	default: /* newer than we are */
		break;
	}
}
