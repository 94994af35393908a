/* PID 1, from the kernel's first instruction of user space to the open channel. Every millisecond here is one of the user's. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <sys/io.h>
#endif
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { VSOCK_PORT = 1024, MODULE_LIST = 16384, WAIT_MS = 5000 };

bool network_modules_pending;
static char module_list[MODULE_LIST], command_line[4096];

void fatal(const char *code, const char *format, ...)
{
	char text[512];
	va_list args;
	va_start(args, format);
	text_formatv(text, sizeof text, format, args);
	va_end(args);
	text_complain("stoker-agent: fatal: %s: %s\n", code, text);
	if (agent.mode != MODE_INIT)
		_exit(1);
	power_off_now(false);
}

/* PID 1 may start without descriptors 0 to 2 (an initramfs has no /dev/console of its own). */
static void open_console(void)
{
	int fd = open("/dev/console", O_RDWR | O_NOCTTY);
	if (fd < 0)
		fd = open("/dev/null", O_RDWR);
	for (int i = 0; i < 3; i++)
		if (fd != i)
			dup2(fd, i);
	if (fd > 2)
		close(fd);
}

static bool on_command_line(const char *word)
{
	size_t n = strlen(word);
	for (const char *at = command_line; (at = text_find(at, word)); at += n)
		if ((at == command_line || at[-1] == ' ') && (!at[n] || at[n] == ' ' || at[n] == '\n'))
			return true;
	return false;
}

bool modules_load(const char *name, int *error)
{
	char path[128];
	text_format(path, sizeof path, "/modules/%s", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool ok = fd >= 0 && (syscall(SYS_finit_module, fd, "", 0) == 0 || errno == EEXIST);
	*error = ok ? 0 : errno;
	if (fd >= 0)
		close(fd);
	if (agent.debug)
		text_complain("stoker-agent: %lu us: %s: %s\n", (unsigned long)since_boot_us(), name, strerror(*error));
	return ok;
}

static bool has_pci(void)
{
	DIR *d = opendir("/sys/bus/pci/devices");
	bool found = false;
	for (struct dirent *e; d && !found && (e = readdir(d));)
		found = e->d_name[0] != '.';
	if (d)
		closedir(d);
	return found;
}

/*
 * One line of /modules/list (docs/initramfs.md): `?` before the name: may fail; `net:`: only with a network; `pci:`: only on a
 * machine that has a PCI bus; `vsock:`: only when that is the channel; `later:`: only when configure names it.
 */
static void load_line(const char *line, bool network)
{
	bool optional = false, for_network = false;
	int error;
	for (;;) {
		if (*line == '?') {
			optional = true;
			line++;
		} else if (!strncmp(line, "net:", 4)) {
			for_network = true;
			line += 4;
		} else if (!strncmp(line, "pci:", 4)) {
			if (network || !has_pci())
				return;
			line += 4;
		} else if (!strncmp(line, "vsock:", 6)) {
			if (network || !on_command_line("stoker.channel=vsock"))
				return;
			line += 6;
		} else if (!strncmp(line, "later:", 6)) {
			return;
		} else {
			break;
		}
	}
	if (!*line || *line == '#')
		return;
	if (for_network != network) {
		network_modules_pending |= for_network;
		return;
	}
	if (!modules_load(line, &error) && !optional) {
		if (network)
			logf_host("warning", "cannot load the module %s: %s", line, strerror(error));
		else
			fatal("bad_module", "%s: %s", line, strerror(error));
	}
}

static void load_listed(bool network)
{
	for (char *at = module_list; *at;) {
		char line[NAME_ROOM * 2];
		size_t n = strcspn(at, "\n");
		if (n < sizeof line) {
			memcpy(line, at, n);
			line[n] = 0;
			load_line(line, network);
		}
		at += n + (at[n] == '\n');
	}
}

/* Loads what configure names: the `later:` lines above it are what it needs, and harmless. */
bool modules_load_later(const char *name, int *error)
{
	for (const char *at = module_list; *at;) {
		size_t n = strcspn(at, "\n");
		const char *file = at + (*at == '?');
		if (!strncmp(file, "later:", 6)) {
			char needed[NAME_ROOM];
			int ignored;
			text_format(needed, sizeof needed, "%.*s", (int)(at + n - file - 6), file + 6);
			if (!strcmp(needed, name))
				break;
			modules_load(needed, &ignored);
		}
		at += n + (at[n] == '\n');
	}
	return modules_load(name, error);
}

void modules_load_network(void)
{
	if (network_modules_pending)
		load_listed(true);
	network_modules_pending = false;
}

bool mount_over(const char *source, const char *target, const char *type, unsigned long flags, const char *options)
{
	mkdir(target, 0755);
	return mount(source, target, type, flags, options) == 0;
}

static bool directory_is_empty(const char *path)
{
	DIR *d = opendir(path);
	int entries = 0;
	while (d && entries < 3 && readdir(d))
		entries++;
	if (d)
		closedir(d);
	return d && entries < 3;
}

/* What a Linux userland expects besides proc, sys and dev, which are there already. Kernels lack some of these: no error. */
void mount_rest(bool tmpfs_tmp)
{
	enum { SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC };
	mount_over("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mount_over("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	mount_over("mqueue", "/dev/mqueue", "mqueue", SAFE, NULL);
	mount_over("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
	generation_write(0);
	if (tmpfs_tmp && directory_is_empty("/tmp"))
		mount_over("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	mount("cgroup2", "/sys/fs/cgroup", "cgroup2", SAFE, "nsdelegate");
	if (access("/sys/kernel/mm/hugepages", F_OK) == 0)
		mount_over("hugetlbfs", "/dev/hugepages", "hugetlbfs", MS_NOSUID | MS_NODEV, NULL);
	mkdir("/run/lock", 01777);
	chmod("/run/lock", 01777);
	symlink("/proc/self/fd", "/dev/fd");
	symlink("/proc/self/fd/0", "/dev/stdin");
	symlink("/proc/self/fd/1", "/dev/stdout");
	symlink("/proc/self/fd/2", "/dev/stderr");
}

/* Gives the initramfs's memory back. Stays on its file system: the new root is mounted over it. */
static void remove_below(int dir, dev_t device, int depth)
{
	DIR *d = fdopendir(dir);
	if (!d) {
		close(dir);
		return;
	}
	for (struct dirent *e; (e = readdir(d));) {
		struct stat st;
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") || fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) ||
		    st.st_dev != device)
			continue;
		if (S_ISDIR(st.st_mode) && depth) {
			int sub = openat(dirfd(d), e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			if (sub >= 0)
				remove_below(sub, device, depth - 1);
		}
		unlinkat(dirfd(d), e->d_name, S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
	}
	closedir(d);
}

void root_empty(int old_root)
{
	struct stat st;
	if (old_root >= 0 && fstat(old_root, &st) == 0)
		remove_below(old_root, st.st_dev, 16);
}

/* ---- the channel --------------------------------------------------------------------------------------------------------------- */

static int find_port(void)
{
	DIR *d = opendir("/sys/class/virtio-ports");
	int fd = -1;
	for (struct dirent *e; d && fd < 0 && (e = readdir(d));) {
		char path[300], name[NAME_ROOM];
		text_format(path, sizeof path, "/sys/class/virtio-ports/%.128s/name", e->d_name);
		if (e->d_name[0] == '.' || !read_small(path, name, sizeof name) || strcmp(name, "stoker.agent\n"))
			continue;
		text_format(path, sizeof path, "/dev/%.128s", e->d_name);
		fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	}
	if (d)
		closedir(d);
	return fd;
}

/* The host's side names the port in a message that the driver handles a little after it was loaded. */
static void open_port(void)
{
	int fd;
	for (int waited = 0; (fd = find_port()) < 0; waited++) {
		if (waited == WAIT_MS * 2)
			fatal("no_channel", "no virtio-serial port is called stoker.agent");
		usleep(500);
	}
	channel_open(fd, fd);
}

static void open_vsock(void)
{
	struct sockaddr_vm a = {.svm_family = AF_VSOCK, .svm_port = VSOCK_PORT, .svm_cid = VMADDR_CID_ANY};
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 4))
		fatal("no_channel", "vsock port %d: %s", VSOCK_PORT, strerror(errno));
	channel_listen(fd);
}

#ifdef __x86_64__
/* Whether the kernel's clock on any CPU is the timer that PCs began with. */
static bool ticks_by_pit(void)
{
	DIR *d = opendir("/sys/devices/system/clockevents");
	bool found = !d;
	for (struct dirent *e; d && !found && (e = readdir(d));) {
		char path[320], name[NAME_ROOM];
		text_format(path, sizeof path, "/sys/devices/system/clockevents/%.200s/current_device", e->d_name);
		found = read_small(path, name, sizeof name) && !strcmp(name, "pit\n");
	}
	if (d)
		closedir(d);
	return found;
}
#endif

/*
 * What wakes a machine for nothing while it has nothing to do: a look for memory to compact, every half second, and the timer that
 * was running when the kernel found a better one (older kernels leave it so; the VMM then wakes 36 times a second). On a host with
 * hundreds of idle machines that is most of what they cost.
 */
static void rest_deeply(void)
{
	int fd = open("/proc/sys/vm/compaction_proactiveness", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (write(fd, "0\n", 2) != 2)
			text_complain("stoker-agent: compaction_proactiveness: %s\n", strerror(errno));
		close(fd);
	}
#ifdef __x86_64__
	enum { COUNTER = 0x40, MODE = 0x43, ONE_SHOT = 0x30 };
	if (ticks_by_pit() || ioperm(COUNTER, 4, 1))
		return;
	outb(ONE_SHOT, MODE);
	outb(0, COUNTER);
	outb(0, COUNTER);
	ioperm(COUNTER, 4, 0);
#endif
}

void boot(void)
{
	umask(0);
	mount_over("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
	open_console();
	if (access("/dev/null", F_OK))
		fatal("no_devices", "devtmpfs: %s", strerror(errno));
	mount_over("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_over("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	umask(022);
	read_small("/proc/cmdline", command_line, sizeof command_line);
	read_small("/modules/list", module_list, sizeof module_list);
	agent.debug = on_command_line("stoker.debug=1");
	reboot(RB_DISABLE_CAD);
	if (agent.debug)
		text_complain("stoker-agent: %lu us: began at %lu\n", (unsigned long)since_boot_us(), (unsigned long)agent.started_us);
	load_listed(false);
	rest_deeply();
	if (on_command_line("stoker.channel=vsock"))
		open_vsock();
	else
		open_port();
}
