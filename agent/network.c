/* The guest's network by rtnetlink: no program of the image is needed. */
#define _GNU_SOURCE
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct message {
	struct nlmsghdr header;
	uint8_t body[256];
};

struct address {
	int family;
	unsigned prefix;
	uint8_t bytes[16];
};

static size_t length_of(const struct address *a)
{
	return a->family == AF_INET ? 4 : 16;
}

static bool parse_address(const char *text, struct address *a)
{
	char copy[64];
	if (strlen(text) >= sizeof copy)
		return false;
	strcpy(copy, text);
	char *slash = strchr(copy, '/');
	if (slash)
		*slash++ = 0;
	a->family = strchr(copy, ':') ? AF_INET6 : AF_INET;
	unsigned most = a->family == AF_INET ? 32 : 128;
	a->prefix = slash ? (unsigned)text_number(slash, NULL) : most;
	return inet_pton(a->family, copy, a->bytes) == 1 && a->prefix <= most;
}

static void begin(struct message *m, uint16_t type, uint16_t flags, const void *body, size_t n)
{
	memset(m, 0, sizeof *m);
	m->header.nlmsg_type = type;
	m->header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags);
	m->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(n);
	memcpy(m->body, body, n);
}

static void attribute(struct message *m, uint16_t type, const void *data, size_t n)
{
	struct rtattr *a = (struct rtattr *)((uint8_t *)m + NLMSG_ALIGN(m->header.nlmsg_len));
	a->rta_type = type;
	a->rta_len = (uint16_t)RTA_LENGTH(n);
	memcpy(RTA_DATA(a), data, n);
	m->header.nlmsg_len = NLMSG_ALIGN(m->header.nlmsg_len) + (uint32_t)RTA_ALIGN(a->rta_len);
}

/* Sends and waits for the acknowledgement, which the kernel queues before send returns. 0 or an errno. */
static int talk(struct message *m)
{
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	struct {
		struct nlmsghdr header;
		struct nlmsgerr error;
		uint8_t rest[256];
	} answer;
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), error = EIO;
	if (fd < 0)
		return errno;
	if (sendto(fd, m, m->header.nlmsg_len, 0, (struct sockaddr *)&kernel, sizeof kernel) < 0)
		error = errno;
	else if (recv(fd, &answer, sizeof answer, 0) >= (ssize_t)NLMSG_LENGTH(sizeof answer.error) && answer.header.nlmsg_type == NLMSG_ERROR)
		error = -answer.error.error;
	close(fd);
	return error;
}

static int set_link(unsigned index, const uint8_t *mac, uint32_t mtu, bool up)
{
	struct ifinfomsg link = {.ifi_index = (int)index, .ifi_flags = up ? IFF_UP : 0, .ifi_change = up ? IFF_UP : 0};
	struct message m;
	begin(&m, RTM_NEWLINK, 0, &link, sizeof link);
	if (mac)
		attribute(&m, IFLA_ADDRESS, mac, 6);
	if (mtu)
		attribute(&m, IFLA_MTU, &mtu, sizeof mtu);
	return talk(&m);
}

static int add_address(unsigned index, const struct address *a)
{
	struct ifaddrmsg body = {.ifa_family = (uint8_t)a->family, .ifa_prefixlen = (uint8_t)a->prefix, .ifa_index = index};
	struct message m;
	if (a->family == AF_INET6)
		body.ifa_flags = IFA_F_NODAD; /* the host owns the link and the addresses on it */
	begin(&m, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body, sizeof body);
	attribute(&m, IFA_LOCAL, a->bytes, length_of(a));
	attribute(&m, IFA_ADDRESS, a->bytes, length_of(a));
	if (a->family == AF_INET && a->prefix < 31) {
		uint32_t ip, mask = htonl(~0u << (32 - a->prefix));
		memcpy(&ip, a->bytes, 4);
		ip |= ~mask;
		if (a->prefix)
			attribute(&m, IFA_BROADCAST, &ip, 4);
	}
	return talk(&m);
}

/* ---- what was there before -------------------------------------------------------------------------------------------------- */

enum { ADDRESSES_MAX = 64 };

struct held_address {
	struct ifaddrmsg body;
	uint8_t bytes[16];
};

static void keep_address(struct held_address *to, const struct nlmsghdr *h)
{
	const struct ifaddrmsg *a = NLMSG_DATA(h);
	unsigned room = (unsigned)IFA_PAYLOAD(h);
	to->body = *a;
	for (struct rtattr *r = IFA_RTA(a); RTA_OK(r, room); r = RTA_NEXT(r, room))
		if (r->rta_type == IFA_LOCAL || (r->rta_type == IFA_ADDRESS && a->ifa_family == AF_INET6))
			memcpy(to->bytes, RTA_DATA(r), a->ifa_family == AF_INET ? 4 : 16);
}

/* The interface's addresses, at most `most`. */
static unsigned list_addresses(unsigned index, struct held_address *list, unsigned most)
{
	static _Alignas(8) uint8_t data[32768];
	struct ifaddrmsg all = {.ifa_family = AF_UNSPEC};
	struct message m;
	unsigned n = 0;
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	begin(&m, RTM_GETADDR, NLM_F_DUMP, &all, sizeof all);
	bool more = fd >= 0 && send(fd, &m, m.header.nlmsg_len, 0) >= 0;
	while (more) {
		ssize_t left = recv(fd, data, sizeof data, 0);
		more = left > 0;
		for (uint8_t *at = data; more && left >= (ssize_t)NLMSG_HDRLEN;) {
			const struct nlmsghdr *h = (const struct nlmsghdr *)at;
			more = h->nlmsg_type == RTM_NEWADDR;
			if (more && n < most && ((struct ifaddrmsg *)NLMSG_DATA(h))->ifa_index == index)
				keep_address(&list[n++], h);
			at += NLMSG_ALIGN(h->nlmsg_len);
			left -= (ssize_t)NLMSG_ALIGN(h->nlmsg_len);
		}
	}
	if (fd >= 0)
		close(fd);
	return n;
}

/* Takes the interface's addresses, and with them the routes by them, away. 0 or an errno. */
static int remove_addresses(unsigned index)
{
	static struct held_address list[ADDRESSES_MAX];
	unsigned n = list_addresses(index, list, ADDRESSES_MAX);
	int error = 0;
	for (unsigned i = 0; i < n; i++) {
		struct message m;
		begin(&m, RTM_DELADDR, 0, &list[i].body, sizeof list[i].body);
		attribute(&m, IFA_LOCAL, list[i].bytes, list[i].body.ifa_family == AF_INET ? 4 : 16);
		int failed = talk(&m);
		/* Those that hung on another are gone with it. */
		if (failed && failed != EADDRNOTAVAIL && !error)
			error = failed;
	}
	return error;
}

static int add_default_route(unsigned index, const struct address *gateway, bool on_link)
{
	struct rtmsg body = {.rtm_family = (uint8_t)gateway->family, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_BOOT,
			     .rtm_scope = RT_SCOPE_UNIVERSE, .rtm_type = RTN_UNICAST, .rtm_flags = on_link ? RTNH_F_ONLINK : 0};
	struct message m;
	begin(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body, sizeof body);
	attribute(&m, RTA_GATEWAY, gateway->bytes, length_of(gateway));
	attribute(&m, RTA_OIF, &index, sizeof index);
	return talk(&m);
}

bool network_loopback(void)
{
	return set_link(1, NULL, 0, true) == 0;
}

static bool parse_mac(const char *text, uint8_t mac[6])
{
	static const char digits[] = "0123456789abcdefABCDEF";
	for (int i = 0; i < 18; i++) {
		char c = text[i];
		const char *d = c ? strchr(digits, c) : NULL;
		if (i % 3 == 2 ? c != (i < 17 ? ':' : 0) : !d)
			return false;
		if (i % 3 < 2)
			mac[i / 3] = (uint8_t)(mac[i / 3] << 4 | (d - digits < 16 ? d - digits : d - digits - 6));
	}
	return true;
}

/* An address, and the default route of its family by a gateway, where they are told. */
static bool set_address(const struct mp *n, unsigned index, const char *name, const char *own, const char *by, struct failure *f)
{
	char text[64];
	struct address address, gateway;
	int error;
	struct mp v = mp_get(n, own);
	bool has_address = mp_is_text(&v);
	if (has_address && (!mp_copy(&v, text, sizeof text) || !parse_address(text, &address)))
		return fail(f, "bad_request", EINVAL, "network: not an address");
	if (has_address && (error = add_address(index, &address)))
		return fail(f, "network_failed", error, "%s address %s: %s", name, text, strerror(error));
	v = mp_get(n, by);
	if (!mp_is_text(&v) || !v.count)
		return true;
	if (!mp_copy(&v, text, sizeof text) || !parse_address(text, &gateway))
		return fail(f, "bad_request", EINVAL, "network: not a gateway");
	error = add_default_route(index, &gateway, false);
	if (error == ENETUNREACH || error == EHOSTUNREACH || error == EINVAL)
		error = add_default_route(index, &gateway, true); /* a gateway outside the prefix, as with /32 addresses */
	return !error || fail(f, "network_failed", error, "default route by %s: %s", text, strerror(error));
}

/* Off is off: not even a link-local address. A kernel without IPv6 has nothing to switch. */
static bool set_ipv6(const char *name, bool on, struct failure *f)
{
	char path[64 + IFNAMSIZ];
	text_format(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", name);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return on || errno == ENOENT || fail(f, "network_failed", errno, "%s: IPv6: %s", name, strerror(errno));
	bool ok = write(fd, on ? "0" : "1", 1) == 1;
	int error = errno;
	close(fd);
	return ok || fail(f, "network_failed", error, "%s: IPv6: %s", name, strerror(error));
}

bool network_configure(const struct mp *n, struct failure *f)
{
	char name[IFNAMSIZ] = "eth0", text[64];
	uint8_t mac[6];
	struct mp v = mp_get(n, "interface");
	int error;
	if (v.type != MP_MISSING && !mp_copy(&v, name, sizeof name))
		return fail(f, "bad_request", EINVAL, "network: the interface's name is too long");
	unsigned index = 0;
	for (int tries = 0; !(index = if_nametoindex(name)) && tries < 500; tries++)
		usleep(1000); /* its driver was loaded a moment ago */
	if (!index)
		return fail(f, "network_failed", ENODEV, "no network interface %s", name);
	v = mp_get(n, "mac");
	bool has_mac = mp_is_text(&v);
	if (has_mac && (!mp_copy(&v, text, sizeof text) || !parse_mac(text, mac)))
		return fail(f, "bad_request", EINVAL, "network: not a MAC address");
	if ((error = set_link(index, has_mac ? mac : NULL, (uint32_t)mp_u64_or(n, "mtu", 0, 65535), false)))
		return fail(f, "network_failed", error, "%s: %s", name, strerror(error));
	if (!set_ipv6(name, mp_bool_or(n, "ipv6", true), f))
		return false;
	if ((error = set_link(index, NULL, 0, true)))
		return fail(f, "network_failed", error, "%s up: %s", name, strerror(error));
	return set_address(n, index, name, "address", "gateway", f) && set_address(n, index, name, "address6", "gateway6", f);
}

/* A copy keeps nothing of the original's: also the link-local address, which was made of the MAC, is another one. */
bool network_change(const struct mp *n, struct failure *f)
{
	char name[IFNAMSIZ] = "eth0", text[64];
	uint8_t mac[6];
	struct mp v = mp_get(n, "interface"), m = mp_get(n, "mac");
	if (v.type != MP_MISSING && !mp_copy(&v, name, sizeof name))
		return fail(f, "bad_request", EINVAL, "network: the interface's name is too long");
	unsigned index = if_nametoindex(name);
	if (!index)
		return fail(f, "network_failed", ENODEV, "no network interface %s", name);
	int error = remove_addresses(index);
	if (error)
		return fail(f, "network_failed", error, "%s: old addresses: %s", name, strerror(error));
	if (!network_configure(n, f))
		return false;
	if (mp_bool_or(n, "ipv6", true) && mp_copy(&m, text, sizeof text) && parse_mac(text, mac)) {
		struct address own = {AF_INET6, 64, {0xfe, 0x80, [8] = mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}};
		error = add_address(index, &own);
		/* A kernel without IPv6 has no such address. */
		if (error && error != EAFNOSUPPORT && error != EOPNOTSUPP && error != EACCES)
			return fail(f, "network_failed", error, "%s: link-local address: %s", name, strerror(error));
	}
	return true;
}
