"""Moving memory between this process and another: process_vm_readv and process_vm_writev, many runs in one call.

Both need ptrace rights over the other process: the same user and a VMM that is dumpable, or CAP_SYS_PTRACE.
"""

from __future__ import annotations

import ctypes
import os
from array import array

from stoker.errors import HostError

__all__ = ["LONGEST", "read_runs", "write_runs"]

LONGEST = 1 << 20
"""Bytes of a run: one call moves less than 2 GiB, so a thousand such runs fit."""
_IOV_MAX = 1024
_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = _libc.process_vm_writev.restype = ctypes.c_ssize_t


def read_runs(pid: int, starts: array[int], lengths: array[int], address: int) -> None:
    """Copies runs of ``pid``'s memory (each of at most `LONGEST` bytes) to consecutive bytes of ours from ``address`` on.

    Blocks, and lets go of the interpreter's lock.
    """
    _transfer(_libc.process_vm_readv, pid, starts, lengths, address)


def write_runs(pid: int, starts: array[int], lengths: array[int], address: int) -> None:
    """The other way round."""
    _transfer(_libc.process_vm_writev, pid, starts, lengths, address)


def _transfer(call: ctypes._NamedFuncPointer, pid: int, starts: array[int], lengths: array[int], address: int) -> None:
    # An iovec is an address and a length, so the runs in turn are the remote side as the kernel wants it.
    remote = array("Q", bytes(16 * len(starts)))
    remote[0::2], remote[1::2] = starts, lengths
    base, _ = remote.buffer_info()
    local = (ctypes.c_uint64 * 2)()
    for first in range(0, len(starts), _IOV_MAX):
        count = min(_IOV_MAX, len(starts) - first)
        wanted = sum(lengths[first : first + count])
        local[0], local[1] = address, wanted
        there = ctypes.c_void_p(base + 16 * first)
        done = call(pid, ctypes.byref(local), ctypes.c_ulong(1), there, ctypes.c_ulong(count), ctypes.c_ulong(0))
        if done != wanted:
            code = ctypes.get_errno() if done < 0 else 0
            why = os.strerror(code) if code else f"only {done} of {wanted} bytes"
            raise HostError("memory_unreachable", f"the memory of process {pid} cannot be moved: {why}", "stoker doctor")
        address += wanted
