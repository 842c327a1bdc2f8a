"""The machine apart from its GPUs: cores, memory, shared memory, limits, clock.

Enters: /proc, /sys and the process's limits. Leaves: findings. Raises no limit.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from regmix.display import size
from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem

GIB = 1 << 30
FEW_FILES, MANY_FILES = 256, 1024
SHARED_BYTES = GIB  # NCCL's buffers of eight ranks; Docker's default is 64 MiB
EARLIEST = 1735689600  # 1 January 2025, before this package was written


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the system says; None where it does not say. Limits: None is unlimited.

    cores: usable; quota: cores' worth of time that the container is given; memory_limit_bytes:
    of the container; seconds: the clock, since 1970.
    """

    cores: int
    machine_cores: int
    quota: float | None
    total_bytes: int | None
    available_bytes: int | None
    memory_limit_bytes: int | None
    shared_bytes: int | None
    open_files: int | None
    open_files_ceiling: int | None
    address_bytes: int | None
    file_bytes: int | None
    seconds: float
    num_gpus: int


def gather(request: Request) -> Facts:
    """Return the facts of this machine."""
    import resource

    from regmix.provenance import available_cores

    def limit(name: int, which: int = 0) -> int | None:
        value = resource.getrlimit(name)[which]
        return None if value == resource.RLIM_INFINITY else value

    memory = read_memory(_text(Path("/proc/meminfo")))
    quota, memory_limit = read_cgroup(Path("/sys/fs/cgroup"), _text(Path("/proc/self/cgroup")))
    shared = Path("/dev/shm")
    status = os.statvfs(shared) if shared.is_dir() else None
    return Facts(
        cores=available_cores(),
        machine_cores=os.cpu_count() or 1,
        quota=quota,
        total_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        memory_limit_bytes=memory_limit,
        shared_bytes=None if status is None else status.f_blocks * status.f_frsize,
        open_files=limit(resource.RLIMIT_NOFILE),
        open_files_ceiling=limit(resource.RLIMIT_NOFILE, 1),
        address_bytes=limit(resource.RLIMIT_AS),
        file_bytes=limit(resource.RLIMIT_FSIZE),
        seconds=time.time(),
        num_gpus=int(request.answer("torch").get("num_devices") or 0),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def read_memory(text: str) -> dict[str, int]:
    """Return name -> bytes of /proc/meminfo."""
    lines = (line.split() for line in text.splitlines())
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in lines if len(w) == 3 and w[2] == "kB"}


def read_cgroup(root: Path, membership: str) -> tuple[float | None, int | None]:
    """Return cores' worth of time and bytes of memory that the control groups allow (v2, v1).

    membership: the text of /proc/self/cgroup. The tightest of the group and those above it counts.
    """
    quotas: list[float] = []
    limits: list[int] = []
    own = next((line[3:] for line in membership.splitlines() if line.startswith("0::")), "/")
    group = root / own.strip().lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdecimal() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
        most = _text(folder / "memory.max").strip()
        if most.isdecimal():
            limits.append(int(most))
    allowed = _text(root / "cpu" / "cpu.cfs_quota_us").strip()
    period = _text(root / "cpu" / "cpu.cfs_period_us").strip()
    if allowed.isdecimal() and period.isdecimal() and int(period):
        quotas.append(int(allowed) / int(period))
    most = _text(root / "memory" / "memory.limit_in_bytes").strip()
    if most.isdecimal() and int(most) < 1 << 60:  # without a limit it holds nearly 2^63
        limits.append(int(most))
    return min(quotas, default=None), min(limits, default=None)


def check_cores(facts: Facts) -> list[Finding]:
    """How many cores may be used, and how much of their time?"""
    if facts.quota is not None and facts.quota < facts.cores:
        workers = max(1, int(facts.quota))
        return [
            note(
                f"{facts.cores} cores to be seen, but this container is given the time of "
                f"{facts.quota:.3g}",
                f"Give proxies --workers {workers}, or raise the container's CPU limit",
            )
        ]
    if facts.cores < facts.machine_cores:
        return [
            note(
                f"{facts.cores} of the machine's {facts.machine_cores} cores may be used",
                "If that is not meant, look at taskset, the scheduler's --cpus-per-task or the "
                "container's cpuset",
            )
        ]
    return [ok(f"{facts.cores} cores, all may be used")]


def check_memory(facts: Facts) -> list[Finding]:
    """Is there memory to work in?"""
    if facts.total_bytes is None or facts.available_bytes is None:
        return [note("the memory is not known", "Look at it by hand: free -h")]
    total, available, whose = facts.total_bytes, facts.available_bytes, "memory"
    if facts.memory_limit_bytes is not None and facts.memory_limit_bytes < total:
        total, whose = facts.memory_limit_bytes, "memory (the container's limit)"
        available = min(available, total)
    what = f"{whose}: {size(available)} available of {size(total)}"
    if available < GIB:
        return [problem(what, "Stop other programs, or raise the limit: 1 GB is the least")]
    if available < 4 * GIB:
        return [note(what, "Give proxies fewer --workers; each takes about 1 GB")]
    return [ok(what)]


def check_shared_memory(facts: Facts) -> list[Finding]:
    """Is /dev/shm large enough for several GPUs to talk through?"""
    if facts.shared_bytes is None:
        what, cure = "no /dev/shm", "Mount a tmpfs there, 1 GB or more"
    elif facts.shared_bytes < SHARED_BYTES:
        what = f"/dev/shm has {size(facts.shared_bytes)}, little for several GPUs"
        cure = "Start the container with --shm-size=8g or --ipc=host"
    else:
        return [ok(f"shared memory: {size(facts.shared_bytes)}")]
    return [problem(what, cure) if facts.num_gpus > 1 else note(what, cure)]


def check_limits(facts: Facts) -> list[Finding]:
    """Do the process's limits leave room for many mapped files and large ones?"""
    found = []
    files = facts.open_files
    if files is not None and files < MANY_FILES:
        ceiling = facts.open_files_ceiling
        to = "65536" if ceiling is None or ceiling >= 65536 else str(ceiling)
        level = problem if files < FEW_FILES else note
        what = f"{files:,} files may be open at once; a corpus keeps each of its files mapped"
        found.append(level(what, f"ulimit -n {to} (or ask the administrator for more)"))
    if facts.address_bytes is not None:
        level = problem if facts.num_gpus else note
        most = size(facts.address_bytes)
        what = f"the address space is limited to {most}; CUDA and mapped shards reserve far more"
        found.append(level(what, "ulimit -v unlimited"))
    if facts.file_bytes is not None:
        what = f"files may have at most {size(facts.file_bytes)}"
        found.append(note(what, "ulimit -f unlimited"))
    if found:
        return found
    return [ok(f"limits: {'any number of' if files is None else f'{files:,}'} open files")]


def check_clock(facts: Facts) -> list[Finding]:
    """Is the clock possible?"""
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.seconds))
    if facts.seconds < EARLIEST:
        return [
            problem(
                f"the clock says {day}: before this program was written",
                "Set the clock (chrony, ntpd, or the host's clock for a container)",
            )
        ]
    return [ok(f"clock: {day}")]


SUBJECT = Subject(
    "machine", gather, (check_cores, check_memory, check_shared_memory, check_limits, check_clock)
)
