/* `info`: counters for metrics, straight from /proc and /sys. */
#define _GNU_SOURCE
#include "agent.h"

#include <stdlib.h>
#include <string.h>

enum { ROWS = 32 };

static char text[16384];

static uint64_t kilobytes(const char *key)
{
	const char *at = text_find(text, key);
	return at ? text_number(at + strlen(key), NULL) * 1024 : 0;
}

/* Both files have exactly two decimals. */
static uint64_t hundredths(char **at)
{
	uint64_t whole = text_number(*at, at);
	return whole * 100 + (**at == '.' ? text_number(*at + 1, at) : 0);
}

static void put_times(struct mp_writer *w)
{
	char uptime[64], load[64];
	read_small("/proc/uptime", uptime, sizeof uptime);
	read_small("/proc/loadavg", load, sizeof load);
	/* Hundredths: there are no floating-point numbers in the protocol. */
	char *at = uptime;
	mpw_key_uint(w, "uptime_ms", hundredths(&at) * 10);
	mpw_str(w, "load");
	mpw_array(w, 3);
	at = load;
	for (int i = 0; i < 3; i++)
		mpw_uint(w, hundredths(&at));
}

static void put_memory(struct mp_writer *w)
{
	static const char *const keys[] = {"MemTotal:", "MemFree:", "MemAvailable:", "Buffers:", "\nCached:", "SwapTotal:", "SwapFree:"};
	static const char *const names[] = {"total", "free", "available", "buffers", "cached", "swap_total", "swap_free"};
	read_small("/proc/meminfo", text, sizeof text);
	mpw_str(w, "memory");
	mpw_map(w, 7);
	for (int i = 0; i < 7; i++)
		mpw_key_uint(w, names[i], kilobytes(keys[i]));
}

/* The first line of /proc/stat, in ticks of 10 ms, and the number of CPUs. */
static void put_cpu(struct mp_writer *w)
{
	static const char *const names[] = {"user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"};
	read_small("/proc/stat", text, sizeof text);
	char *at = text + strcspn(text, " ");
	unsigned cpus = 0;
	mpw_str(w, "cpu");
	mpw_map(w, 9);
	for (int i = 0; i < 8; i++)
		mpw_key_uint(w, names[i], text_number(at, &at));
	for (const char *line = text_find(text, "\ncpu"); line; line = text_find(line + 1, "\ncpu"))
		cpus++;
	mpw_key_uint(w, "cpus", cpus);
}

static bool wanted_disk(const char *name)
{
	/* Partitions are counted with their disk; loop and ram devices are nobody's. */
	char path[NAME_ROOM + 32];
	text_format(path, sizeof path, "/sys/block/%.60s/stat", name);
	char one[8];
	return strncmp(name, "loop", 4) && strncmp(name, "ram", 3) && read_small(path, one, sizeof one);
}

static void put_disks(struct mp_writer *w)
{
	read_small("/proc/diskstats", text, sizeof text);
	mpw_str(w, "disks");
	size_t mark = mpw_open_array(w);
	uint32_t n = 0;
	for (char *line = strtok(text, "\n"); line && n < ROWS; line = strtok(NULL, "\n")) {
		/* major minor name reads merged sectors ms writes merged sectors ms ... */
		uint64_t v[8];
		char *at = line;
		text_number(at, &at);
		text_number(at, &at);
		char *name = at + strspn(at, " ");
		at = name + strcspn(name, " ");
		if (!*at)
			continue;
		*at++ = 0;
		if (!wanted_disk(name))
			continue;
		for (int i = 0; i < 8; i++)
			v[i] = text_number(at, &at);
		n++;
		mpw_map(w, 7);
		mpw_key_str(w, "name", name);
		mpw_key_uint(w, "reads", v[0]);
		mpw_key_uint(w, "read_bytes", v[2] * 512);
		mpw_key_uint(w, "read_ms", v[3]);
		mpw_key_uint(w, "writes", v[4]);
		mpw_key_uint(w, "written_bytes", v[6] * 512);
		mpw_key_uint(w, "write_ms", v[7]);
	}
	mpw_close(w, mark, n);
}

static void put_networks(struct mp_writer *w)
{
	static const char *const names[] = {"rx_bytes", "rx_packets", "rx_errors", "rx_drops", NULL, NULL, NULL, NULL,
					    "tx_bytes", "tx_packets", "tx_errors", "tx_drops"};
	read_small("/proc/net/dev", text, sizeof text);
	mpw_str(w, "networks");
	size_t mark = mpw_open_array(w);
	uint32_t n = 0;
	for (char *line = strtok(text, "\n"); line && n < ROWS; line = strtok(NULL, "\n")) {
		char *colon = strchr(line, ':'), *name = line + strspn(line, " ");
		if (!colon)
			continue;
		*colon = 0;
		char *at = colon + 1;
		n++;
		mpw_map(w, 9);
		mpw_key_str(w, "name", name);
		for (int i = 0; i < 12; i++) {
			uint64_t v = text_number(at, &at);
			if (names[i])
				mpw_key_uint(w, names[i], v);
		}
	}
	mpw_close(w, mark, n);
}

static void put_agent(struct mp_writer *w)
{
	unsigned total = 0;
	for (struct process *p = processes_first; p; p = p->next)
		total++;
	char statm[64];
	read_small("/proc/self/statm", statm, sizeof statm);
	char *at = statm;
	text_number(at, &at);
	mpw_str(w, "agent");
	mpw_map(w, 3);
	mpw_key_uint(w, "resident", text_number(at, NULL) * 4096);
	mpw_key_uint(w, "running", processes_running);
	mpw_key_uint(w, "remembered", total);
}

void call_info(uint32_t request)
{
	static uint8_t buffer[32768];
	struct mp_writer w;
	mpw_init(&w, buffer, sizeof buffer);
	mpw_map(&w, 7);
	put_times(&w);
	put_cpu(&w);
	put_memory(&w);
	put_disks(&w);
	put_networks(&w);
	put_agent(&w);
	reply(request, &w);
}
