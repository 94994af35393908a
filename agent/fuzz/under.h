/* The agent's sources under the fuzzer: what would change this host does nothing. Included before them. */
#ifndef STOKER_FUZZ_UNDER_H
#define STOKER_FUZZ_UNDER_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define kill(...) (errno = ESRCH, -1)
#define fork() (errno = EAGAIN, -1)
#define clock_settime(...) (errno = EPERM, -1)
#define sethostname(...) (errno = EPERM, -1)
#define mount(...) (errno = EPERM, -1)
#define umount2(...) (errno = EPERM, -1)
#define chroot(...) (errno = EPERM, -1)
#define reboot(...) (errno = EPERM, -1)
#define ioctl(...) (errno = EPERM, -1)
#define unlink(...) (errno = EPERM, -1)
#define mkdir(...) (errno = EPERM, -1)
#define sync() ((void)0)
#define wait4(...) (errno = ECHILD, -1)

#endif
