"""Programs that try to get out of the sandbox, to do harm, or to last for ever.

A program prints "escaped" if it succeeds; a sandbox that prevents it leaves it nothing to print. None does harm where a
sandbox fails: they open files and do not write, make files of a name of their own, and call with arguments that the
kernel refuses for another reason. `CONTROLS` are those that may run without a sandbox, and succeed there, which shows
that the programs can fail. No other attack may ever run outside of a sandbox.
"""

from __future__ import annotations

from dataclasses import dataclass

from dasd_lite.grading.code.sandbox import Limits, Sandbox
from dasd_lite.grading.code.seccomp import DENIED, MACHINES

QUICK = Limits(cpu_seconds=1, wall_seconds=10)
SHORT = Limits(cpu_seconds=5, wall_seconds=1)


@dataclass(frozen=True)
class Attack:
    """A program, the limits to run it with, and how its run may end ("" is: by itself)."""

    code: str
    limits: Limits = QUICK
    ends: tuple[str, ...] = ("",)


def each_raises(*attempts: str, imports: str = "os") -> str:
    """A program that escapes if one of these expressions does not raise OSError or RuntimeError."""
    tries = "\n".join(
        f"try:\n    {attempt}\n    print('escaped by', {attempt!r})\nexcept (OSError, RuntimeError): pass"
        for attempt in attempts
    )
    return f"import {imports}\n{tries}"


SOCKETS = """
import socket
for family in range(46):
    for kind in 1, 2, 3, 5:
        try:
            socket.socket(family, kind)
            print("escaped: socket", family, kind)
        except OSError: pass
try:
    socket.socketpair()
    print("escaped: a pair")
except OSError: pass
"""

NAMES = """
import socket
try: print("escaped", socket.getaddrinfo("localhost", 80))
except OSError: pass
"""

# the folders above Python are there, and empty but for it
READ = """
import os, sys
paths = ["/etc/passwd", "/etc/shadow", "/etc/hosts", "/root", "/root/.ssh", "/home", "/var/log", "/sys/kernel", "/run",
         "/proc/1/root/etc/passwd", "/proc/1/cwd/root", "/mnt", os.path.expanduser("~/.ssh")]
for path in paths:
    try:
        seen = os.listdir(path) if os.path.isdir(path) else open(path).read(1)
        if set(seen) - set(sys.prefix.split("/")): print("escaped: reads", path)
    except OSError: pass
"""

WRITE = """
import os
for folder in ["/tmp", "/", "/dev", "/dev/shm", "/usr", "/usr/lib", "/etc", "/proc", "/var/tmp", "."]:
    path = folder + "/dasd-lite-escape"
    for make in (lambda: open(path, "x").close(), lambda: os.mkdir(path), lambda: os.symlink("a", path),
                 lambda: os.mkfifo(path)):
        try:
            make()
            print("escaped: made", path)
        except OSError: pass
for path in ["/proc/sys/vm/swappiness", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/usr/bin/env",
             "/sys/kernel/mm/transparent_hugepage/enabled", "/usr/bin/python3", "/proc/self/oom_score_adj"]:
    try:
        open(path, "r+b")
        print("escaped: opened", path)
    except OSError: pass
"""

# the files that the grader hands over are sealed
OWN_FILES = """
import os
for number in range(64):
    try: name = os.readlink(f"/proc/self/fd/{number}")
    except OSError: continue
    if "memfd" in name:
        for attempt in (lambda: os.write(number, b"x"), lambda: os.ftruncate(number, 10**6),
                        lambda: open(f"/proc/self/fd/{number}", "r+b").truncate(10**6)):
            try:
                attempt()
                print("escaped: changed", name)
            except OSError: pass
"""

# another process in the sandbox would have other limits
NEIGHBORS = """
import glob, os
for path in glob.glob("/proc/[0-9]*"):
    if path != f"/proc/{os.getpid()}":
        print("escaped: sees", path)
"""

FORK_BOMB = """
import os
for _ in range(50):
    try: child = os.fork()
    except OSError: break
    if child == 0:
        os._exit(0)
    print("escaped")
"""

DAEMON = """
import os, sys, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
    print("escaped")
except OSError: pass
"""

PROCESSES = """
import multiprocessing, os, subprocess
for attempt in (lambda: subprocess.run(["/bin/true"]), lambda: os.posix_spawn("/bin/true", ["true"], {}),
                lambda: multiprocessing.Process(target=print).start(), lambda: os.popen("true").close(),
                lambda: os.forkpty()):
    try:
        attempt()
        print("escaped")
    except OSError: pass
if os.system("true") == 0:
    print("escaped by system")
"""

# as clone_with_vfork in C would: straight to the kernel, where clone3 must not exist and x32 has no table
RAW_PROCESSES = """
import ctypes, errno, os, platform
libc = ctypes.CDLL(None, use_errno=True)
clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
me = os.getpid()
def call(*arguments):
    done = libc.syscall(*map(ctypes.c_long, arguments))
    if os.getpid() != me:
        os._exit(0)
    return done, ctypes.get_errno()
if call(clone, 17, 0, 0, 0, 0) != (-1, errno.EPERM): print("escaped by clone")
if call(clone, 0x10000000 | 17, 0, 0, 0, 0) != (-1, errno.EPERM): print("escaped by a new user")
if call(435, 0, 0) != (-1, errno.ENOSYS): print("escaped by clone3")
if call(0x40000000 + 41, 1, 1, 0) != (-1, errno.EPERM): print("escaped by x32")
"""

OTHER_TABLE = """
import ctypes, mmap, platform
if platform.machine() == "x86_64":
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex("b814000000cd80c3"))  # getpid by the table of 32-bit programs
    print("escaped", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""

THREADS = """
import threading, time
threading.stack_size(64 * 1024)
try:
    for _ in range(3000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    print("escaped")
except RuntimeError: pass
"""

SIGNALS = each_raises(
    *("os.kill(1, 0)", "os.kill(os.getppid() or 2, 0)", "os.kill(-1, 0)", "os.killpg(os.getppid() or 2, 0)"),
    *("resource.prlimit(1, resource.RLIMIT_NOFILE)", "resource.prlimit(os.getppid() or 2, resource.RLIMIT_NOFILE)"),
    *("os.setpriority(os.PRIO_USER, 0, 19)", "os.sched_setaffinity(1, [0])", "fcntl.fcntl(0, fcntl.F_SETOWN, 1)"),
    "os.pidfd_open(1)",
    imports="fcntl, os, resource",
)

# refused before the path is looked up, else it would be FileNotFoundError
FILE_MODES = """
import os
path = "/no/such/file"
for change in (lambda: os.chmod(path, 0), lambda: os.chown(path, -1, -1), lambda: os.utime(path),
               lambda: os.chroot(path), lambda: os.setxattr(path, "user.a", b""),
               lambda: os.removexattr(path, "user.a"), lambda: os.truncate(path, 0), lambda: os.mkfifo(path)):
    try: change()
    except PermissionError: continue
    except OSError: pass
    print("escaped")
"""

LOCKS = each_raises(
    *("fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)", "fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)"),
    imports="fcntl, os\nfile = os.open(os.__file__, os.O_RDONLY)",
)

STAYS = """
import ctypes
if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0:
    print("escaped: would outlive the grader")
"""

MEMORY_AT_ONCE = """
try:
    block = bytearray(6 << 30)
    print("escaped")
except MemoryError: pass
"""

MEMORY_BY_PIECES = """
import mmap
pieces = []
try:
    while True: pieces.append(mmap.mmap(-1, 16 << 20))
except (OSError, MemoryError): pass
if len(pieces) * 16 > 1024: print("escaped")
"""

MEMORY_ELSEWHERE = each_raises("os.memfd_create('a')", "shared_memory.SharedMemory(create=True, size=4096)",
    imports="os\nfrom multiprocessing import shared_memory")  # fmt: skip

DISK = """
import os
for folder in "/tmp", "/dev/shm", "/var/tmp", "/", ".":
    try:
        with open(f"{folder}/dasd-lite-escape", "xb") as file:
            print("escaped", folder)
            file.write(bytes(1 << 20))
        os.remove(file.name)
    except OSError: pass
"""

LIMITS_RAISED = each_raises(
    *(f"resource.setrlimit(resource.RLIMIT_{name}, (-1, -1))" for name in ("AS", "CPU", "FSIZE", "NPROC", "NOFILE")),
    imports="resource",
).replace("(OSError, RuntimeError)", "(OSError, ValueError)")

SPINS_ON = """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
"""

CLOSED_PIPES = """
import os, time
for number in range(64):
    try: os.close(number)
    except OSError: pass
time.sleep(60)
"""

IGNORES_SIGNALS = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: time.sleep(60)
"""


def shared_by_number(memory: int, semaphores: int, messages: int) -> str:
    """A program that reads what the test has made for it, by the number that it could as well have guessed."""
    return f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
address = libc.shmat({memory}, None, 0o10000)  # SHM_RDONLY
if address not in (None, ctypes.c_void_p(-1).value): print("escaped: reads", ctypes.string_at(address, 8))
if libc.semctl({semaphores}, 0, 12) != -1: print("escaped: GETVAL")
room = ctypes.create_string_buffer(64)
if libc.msgrcv({messages}, room, ctypes.c_size_t(8), ctypes.c_long(0), 0o4000) != -1: print("escaped:", room.raw)
"""


def every_denied_call(machine: str) -> str:
    """A program that makes every system call of the table; all must be refused, whatever the arguments."""
    column = list(MACHINES).index(machine)
    numbers = {name: number for name, both in DENIED.items() if (number := both[column]) is not None}
    return f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers}.items():
    if libc.syscall(*map(ctypes.c_long, (number, -1, -1, -1, -1, -1, -1))) != -1 or ctypes.get_errno() != errno.EPERM:
        print("escaped:", name, ctypes.get_errno())
"""


TIME, FLOOD = ("time limit",), ("output limit",)
ATTACKS: dict[str, Attack] = {
    "sockets: TCP, UDP, raw, Unix, netlink and all others": Attack(SOCKETS),
    "names of machines": Attack(NAMES),
    "reading files of users and the system": Attack(READ),
    "writing files, kernel settings": Attack(WRITE),
    "changing the files of the grader": Attack(OWN_FILES),
    "modes, owners, times, links of files": Attack(FILE_MODES),
    "locks of files": Attack(LOCKS),
    "processes beside its own": Attack(NEIGHBORS),
    "fork bomb": Attack(FORK_BOMB),
    "daemon": Attack(DAEMON),
    "processes by the standard library": Attack(PROCESSES),
    "processes by system calls, new user, x32": Attack(RAW_PROCESSES),
    "the table of 32-bit calls": Attack(OTHER_TABLE, ends=("", "crashed: SIGSYS", "crashed: SIGSEGV")),
    "3,000 threads": Attack(THREADS, SHORT, ("", *TIME)),  # one that fails to start can leave Python waiting
    "signals to and limits of others": Attack(SIGNALS),
    "outliving the grader": Attack(STAYS),
    "6 GB at once": Attack(MEMORY_AT_ONCE),
    "memory by pieces": Attack(MEMORY_BY_PIECES),
    "memory that no limit counts": Attack(MEMORY_ELSEWHERE),
    "filling the disk": Attack(DISK),
    "raising its limits": Attack(LIMITS_RAISED),
    "endless output": Attack("while True: print('x' * 1000)", ends=FLOOD),
    "endless errors": Attack("import sys\nwhile True: sys.stderr.write('x' * 1000)", ends=FLOOD),
    "endless loop, signals ignored": Attack(SPINS_ON, ends=TIME),
    "sleep": Attack("import time; time.sleep(60)", SHORT, TIME),
    "sleep, all signals ignored": Attack(IGNORES_SIGNALS, SHORT, TIME),
    "sleep, all pipes closed": Attack(CLOSED_PIPES, SHORT, TIME),
}

CONTROLS = {
    **{"sockets": SOCKETS, "names": NAMES, "reading": READ, "forks": FORK_BOMB, "processes": PROCESSES},
    **{"neighbors": NEIGHBORS, "threads": THREADS, "memory": MEMORY_BY_PIECES, "modes": FILE_MODES, "outliving": STAYS},
}


def result(sandbox: Sandbox, attack: Attack) -> str:
    """Return "blocked", or what happened."""
    run = sandbox.run_program(attack.code, "", attack.limits)
    if b"escaped" in run.output:
        return run.output.decode(errors="replace")
    return "blocked" if run.fault in attack.ends and not run.ours else f"ended otherwise: {run.fault or 'by itself'}"
