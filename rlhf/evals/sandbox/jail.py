"""What the kernel is asked for on the way into the sandbox: namespaces, a root, no rights, a filter, limits.

Used by ``child.py`` alone, in a process that holds nothing else. Only the standard library.
Linux 5.12 or newer on x86_64 or aarch64. See the man pages of the calls: unshare(2), user_namespaces(7),
pivot_root(2), mount_setattr(2), capset(2), prctl(2), seccomp(2), setrlimit(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from types import SimpleNamespace

STACK = 8 << 20  # bytes
NOBODY = 65534

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine, -1)  # column of the tables below

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
NEW_MOUNT, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
NEW_ANY = NEW_MOUNT | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITY_VERSION_3 = 0x20080522

AUDIT_ARCH = (0xC000003E, 0xC00000B7)
MOUNT_SETATTR = 442
PIVOT_ROOT = (155, 41)
CLONE, CLONE3 = (56, 220), 435
# What a program has no business with: other processes, new namespaces, mounts, memory that no limit counts,
# sockets of any family (a network namespace does not hold AF_VSOCK), the kernel's largest attack surfaces.
DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51),
    "pivot_root": PIVOT_ROOT, "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "socket": (41, 198),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "personality": (135, 92),
}  # fmt: skip


def called(what: str, result: int) -> int:
    """The result of a C call; OSError that names it where it failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process."""
    called(f"prctl {option}", LIBC.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    called(f"mount {target}", LIBC.mount(*words[:3], ctypes.c_ulong(flags), words[3]))


def restrict_mount(path: str, attributes: int, *, recursive: bool = True) -> None:
    """Add attributes to a mount and, if recursive, to those below it."""
    attr = struct.pack("=4Q", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    number, size = ctypes.c_long(MOUNT_SETATTR), ctypes.c_size_t(len(attr))
    called(f"mount_setattr {path}", LIBC.syscall(number, AT_FDCWD, os.fsencode(path), flags, attr, size))


def enter_namespaces(*, as_root: bool, user: int) -> None:
    """Move this process into new namespaces; that of processes begins with the next fork.

    as_root: by the right of root, with no user namespace. user: what root becomes otherwise, before it asks.
    """
    flags = NEW_MOUNT | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    if as_root:
        called("unshare", LIBC.unshare(flags))
        return
    if os.geteuid() == 0:
        become(user)
        prctl(PR_SET_DUMPABLE, 1)  # or the files below would belong to root
    uid, gid = os.geteuid(), os.getegid()
    called("unshare", LIBC.unshare(flags | NEW_USER))
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
            file.write(line)


def build_root(views: list[list[str]], scratch_bytes: int) -> None:
    """Give this mount namespace a root of its own: read-only views (``run.View``) and /tmp.

    scratch_bytes: size of /tmp, which is empty, in memory, and gone with the namespace.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("root", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1024,mode=0755")
    os.mkdir("/tmp/.old")
    called("pivot_root", LIBC.syscall(ctypes.c_long(PIVOT_ROOT[MACHINE]), b"/tmp", b"/tmp/.old"))
    os.chdir("/")
    os.mkdir("/tmp")
    options = f"size={scratch_bytes},nr_inodes=1024,mode=0700"
    mount("scratch", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    for kind, path, target in views:
        if kind == "link":
            os.symlink(target, path)
            continue
        if os.path.isdir(f"/.old{path}"):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/.old{path}", path, None, MS_BIND | MS_REC)
        restrict_mount(path, ATTR_RDONLY | ATTR_NOSUID | (ATTR_NOEXEC if kind == "dev" else ATTR_NODEV))
    called("umount /.old", LIBC.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")
    restrict_mount("/", ATTR_RDONLY, recursive=False)


def become(user: int) -> None:
    """Turn root into a user that owns nothing; into nobody where that number cannot be had."""
    os.setgroups([])
    for number in (user, NOBODY):
        try:
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            return
        except OSError:
            if number == NOBODY:
                raise


def give_up_rights() -> None:
    """Drop all capabilities for good, end with the parent, let no other process look into this one."""
    called("capset", LIBC.capset(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)


def system_call_filter(column: int) -> bytes:
    """The seccomp program, 8 bytes an instruction: what :data:`DENIED` names fails with EPERM.

    A ``clone`` that asks for a namespace fails too. ``clone3``, whose flags a filter cannot see, is said not
    to exist, and the C library then uses ``clone``. A call of another architecture kills the process.

    Args:
        column: of the tables, 0 for x86_64, 1 for aarch64.
    """
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, JEQ, JGE, JSET, RET
    kill, allow, no_right, not_there = 0x80000000, 0x7FFF0000, 0x50000 | 1, 0x50000 | 38  # EPERM, ENOSYS
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data

    def step(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
        return struct.pack("=HBBI", code, skip_if, skip_else, value)

    steps = [step(load, architecture), step(equal, AUDIT_ARCH[column], 1), step(end, kill)]
    steps += [step(load, number)]
    if column == 0:  # the x32 calls of x86_64
        steps += [step(at_least, 0x40000000, 0, 1), step(end, no_right)]
    for numbers in DENIED.values():
        steps += [step(equal, numbers[column], 0, 1), step(end, no_right)]
    steps += [step(equal, CLONE3, 0, 1), step(end, not_there)]
    steps += [step(equal, CLONE[column], 0, 3), step(load, first_argument)]
    steps += [step(any_bit, NEW_ANY, 0, 1), step(end, no_right)]
    return b"".join([*steps, step(end, allow)])


def filter_system_calls() -> None:
    """Install the filter for this process and all that it starts; no_new_privs must be set."""
    if MACHINE < 0:
        raise OSError(f"no system call filter for {os.uname().machine}")
    steps = ctypes.create_string_buffer(system_call_filter(MACHINE))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    program = Program(len(steps) // 8, ctypes.addressof(steps))
    mode = ctypes.c_ulong(2)  # SECCOMP_MODE_FILTER
    called(
        "seccomp", LIBC.prctl(PR_SET_SECCOMP, mode, ctypes.byref(program), ctypes.c_ulong(), ctypes.c_ulong())
    )


def limit_resources(limits: SimpleNamespace) -> None:
    """Set the limits of this process and of those that it starts, hard ones.

    limits: by the names of ``verdict.Limits``. A process that ignores SIGXCPU has one second more until
    SIGKILL.
    """
    cpu = limits.cpu_seconds
    wanted = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NPROC: limits.processes + 1,  # and the guard, which is of the same user
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_STACK: STACK,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_CPU: cpu + 1,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (min(cpu, most) if kind == resource.RLIMIT_CPU else most, most))
