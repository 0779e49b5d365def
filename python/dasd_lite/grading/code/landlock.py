"""The sandbox of the kernel alone: landlock for files, seccomp for the rest. It needs no namespaces and no packages.

The driver closes both behind itself before the program begins. A program may read the system's libraries and Python,
write nothing, and execute nothing. It has no process list of its own, but cannot read that of the machine either.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Any

from dasd_lite.errors import ConfigError

_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
_READ = _READ_FILE | _READ_DIR
# How many kinds of access to files each version of landlock knows, the first being version 1.
_NUM_FILE_ACCESS = (13, 14, 15, 15, 16)
_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64")
_FILES = {
    "/etc/ld.so.cache": _READ_FILE,
    "/dev/null": _READ_FILE | _WRITE_FILE,
    "/dev/zero": _READ_FILE,
    "/dev/random": _READ_FILE,
    "/dev/urandom": _READ_FILE,
}


def landlock_version() -> int:
    """Return the version of landlock that the kernel has.

    Raises:
        ConfigError: It has none, with the reason in half a sentence.
    """
    kernel = ctypes.CDLL(None, use_errno=True)
    version = int(kernel.syscall(444, None, ctypes.c_ulong(0), ctypes.c_ulong(1)))
    if version >= 1:
        return version
    if ctypes.get_errno() == errno.EOPNOTSUPP:
        raise ConfigError("the kernel was started without landlock; add lsm=landlock to its options")
    if ctypes.get_errno() == errno.ENOSYS:
        raise ConfigError(f"kernel {os.uname().release} has none (5.13 and later have it)")
    raise ConfigError(f"the container forbids it ({os.strerror(ctypes.get_errno())})")


def landlock_job(version: int, shown: list[str], packages: list[str], seccomp: bytes) -> dict[str, Any]:
    """Return what the driver needs to close the doors behind itself, besides the process id of the grader.

    Args:
        version: Of landlock.
        shown: Folders of Python and its packages.
        packages: The folder that these packages are in, if any; it can be listed.
        seccomp: The filter.
    """
    num_access = _NUM_FILE_ACCESS[min(version, len(_NUM_FILE_ACCESS)) - 1]
    ruleset = struct.pack("=Q", (1 << num_access) - 1)
    if version >= 4:
        ruleset += struct.pack("=Q", 0b11)  # TCP: bind, connect
    if version >= 6:
        ruleset += struct.pack("=Q", 0b11)  # abstract Unix sockets, signals
    rules = [(folder, _READ) for folder in (*_FOLDERS, *shown)]
    rules += [(folder, _READ_DIR) for folder in packages]
    return {"ruleset": ruleset, "rules": [*rules, *_FILES.items()], "seccomp": seccomp}
