"""The seccomp filter of every sandbox: threads yes, everything that reaches outside of the process no.

Input: the machine. Output: the filter as the kernel takes it. Invariant: a process under it stays one process, so its
memory limit is a limit on everything that it starts; it has no sockets, sends no signals, and changes no file's mode.

The numbers of the system calls differ between machines, so only the machines of `MACHINES` are served.
"""

from __future__ import annotations

import errno
import struct

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""What `platform.machine()` says, and the kernel's number for it (AUDIT_ARCH_… in linux/audit.h)."""

_X32 = 0x40000000  # calls of x86-64's second table have this bit

# Name: number on x86-64, number on aarch64 (None: the machine lacks it). Source: the headers of Linux 6.1, and
# scripts/syscall.tbl of Linux 6.17 for those above 450.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # new processes
    "fork": (57, None),
    "vfork": (58, None),
    # other processes: signals, memory, limits, scheduling
    "kill": (62, 129),
    "timer_create": (222, 107),  # its signal may be SIGKILL
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    # network, and sockets of this machine
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # memory that no limit of a process counts, or that outlives it
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # what all processes of a machine share by number or name: no getting, and no using of what others have got
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "flock": (73, 32),
    # the view of the file system, and what landlock does not watch
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # large parts of the kernel that no program here needs
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_setup": (206, 0),
    "io_destroy": (207, 1),
    "io_submit": (209, 2),
    "io_cancel": (210, 3),
    "io_getevents": (208, 4),
    "io_pgetevents": (333, 292),
    "vmsplice": (278, 75),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "userfaultfd": (323, 282),
    "lookup_dcookie": (212, 18),
    "personality": (135, 92),
    "syslog": (103, 116),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
}
"""System calls that are refused whatever their arguments."""

CHECKED: dict[str, tuple[int, int]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "prctl": (157, 167),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
}
"""System calls that are refused for some arguments, and clone3, which the C library replaces by clone."""

_CLONE_THREAD = 0x10000
_PR_SET_PDEATHSIG = 1  # undone, a program would outlive us
# F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY: signals, also to others, by way of a file; then locks and leases of files
_FILE_COMMANDS = (8, 10, 15, 1026, 6, 7, 37, 38, 1024)

# Classic BPF: load a word, jump if equal, jump if bits are set, return.
_LOAD, _EQUAL, _BITS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes, low half first


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _refuse(error: int) -> bytes:
    return _step(_RETURN, 0x00050000 | error)


def seccomp_filter(machine: str) -> bytes:
    """Return the filter for `machine`, an array of struct sock_filter.

    Raises:
        KeyError: The machine is not in `MACHINES`.
    """
    column = list(MACHINES).index(machine) if machine in MACHINES else -1
    if column < 0:
        raise KeyError(machine)
    checked = {name: numbers[column] for name, numbers in CHECKED.items()}
    denied = [number for numbers in DENIED.values() if (number := numbers[column]) is not None]
    low = [_ARGUMENTS + 8 * index for index in range(2)]
    allow, refuse = _step(_RETURN, _ALLOW), _refuse(errno.EPERM)
    steps = [
        *(_step(_LOAD, _MACHINE), _step(_EQUAL, MACHINES[machine], 1, 0), _step(_RETURN, _KILL)),
        *(_step(_LOAD, _NUMBER), _step(_AT_LEAST, _X32, 0, 1), refuse),
        *(_step(_EQUAL, checked["clone3"], 0, 1), _refuse(errno.ENOSYS)),
        # a block for each: passed over unless the number is this one; it always returns
        *(_step(_EQUAL, checked["clone"], 0, 4), _step(_LOAD, low[0]), _step(_BITS, _CLONE_THREAD, 1, 0)),
        *(refuse, allow),
        *(_step(_EQUAL, checked["prctl"], 0, 4), _step(_LOAD, low[0]), _step(_EQUAL, _PR_SET_PDEATHSIG, 0, 1)),
        *(refuse, allow),
        *(_step(_EQUAL, checked["prlimit64"], 0, 4), _step(_LOAD, low[0]), _step(_EQUAL, 0, 1, 0)),
        *(refuse, allow),
        *(_step(_EQUAL, checked["fcntl"], 0, len(_FILE_COMMANDS) + 3), _step(_LOAD, low[1])),
        *(_step(_EQUAL, command, len(_FILE_COMMANDS) - index, 0) for index, command in enumerate(_FILE_COMMANDS)),
        *(allow, refuse),
        # all others: the first that is equal jumps over the rest and `allow`
        *(_step(_EQUAL, number, len(denied) - index, 0) for index, number in enumerate(denied)),
        *(allow, refuse),
    ]
    return b"".join(steps)
