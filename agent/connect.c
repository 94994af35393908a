/* `connect`: a connection into the guest, as the streams of an entry in the table of processes that has no process.
 *
 * Its standard input is what goes to the other end, its standard output what comes from there; both descriptors are the socket. So
 * offsets, acknowledgements, rings and `attach` are those of a process, and survive what theirs survive.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONNECTIONS = 256, CONNECTION_RING = 128 << 10 };

unsigned connections_sweep(bool all)
{
	unsigned left = 0;
	for (struct process *p = processes_first, *next; p; p = next) {
		next = p->next;
		if (!is_connection(p))
			continue;
		if (all || !p->out.attached)
			process_drop(p);
		else
			left++;
	}
	return left;
}

static void refuse(uint32_t request, int error)
{
	reply_error(request, "unreachable", error, "%s", strerror(error));
}

/* `to` is the address as connect(2) takes it: the host knows how to write it. */
void call_connect(uint32_t request, const struct mp *m)
{
	struct sockaddr_storage to = {0};
	struct mp bytes = mp_get(m, "to");
	uint32_t id = (uint32_t)mp_u64_or(m, "id", 0, UINT32_MAX);
	/* Whoever lost some has attached them again before this, or does not want them any more. */
	bool full = connections_sweep(false) >= CONNECTIONS;
	if (!mp_is_text(&bytes) || bytes.count < sizeof to.ss_family || bytes.count > sizeof to || id < CONNECTION_FIRST ||
	    id >= 2 * CONNECTION_FIRST || process_find(id)) {
		refuse(request, EINVAL);
		return;
	}
	memcpy(&to, bytes.data, bytes.count);
	struct process *p = process_new(id);
	int fd = -1, other = -1;
	errno = EMFILE;
	if (full || !p || (fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) < 0 ||
	    (connect(fd, (struct sockaddr *)&to, bytes.count) && errno != EINPROGRESS) || (other = fcntl(fd, F_DUPFD_CLOEXEC, 3)) < 0) {
		refuse(request, errno);
		if (fd >= 0)
			close(fd);
		free(p);
		return;
	}
	input_init(&p->in, p, fd);
	output_init(&p->out, p, 4 * id + 1, other, CONNECTION_RING);
	output_init(&p->err, p, 4 * id + 2, -1, CONNECTION_RING);
	p->out.attached = p->err.attached = true;
	p->in.writable = false; /* it becomes so when it is connected */
	p->connecting = true;
	p->request = request;
	process_started(p, 0);
}

bool connection_made(struct process *p)
{
	int error = 0;
	socklen_t size = sizeof error;
	if (!p->in.writable && !p->in.gone)
		return false;
	p->connecting = false;
	getsockopt(p->in.watch.fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (!error) {
		reply_empty(p->request);
		return true;
	}
	refuse(p->request, error);
	process_drop(p);
	return false;
}
