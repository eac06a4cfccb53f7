"""How much memory there is to take: of the machine, and of the container that it is shared by."""

import os
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping or passing the limit of a control group.

    All of the machine's memory where Linux does not say. Pages that only cache files count as free:
    the kernel drops them when memory is asked for.

    Args:
        root: where proc and sys lie.
    """
    return max(0, min([_of_the_machine(root), *_of_control_groups(root)]))


def _of_the_machine(root: Path) -> int:
    try:
        with open(root / "proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_control_groups(root: Path) -> Iterator[int]:
    """What is left in each group that this process is in; those above bound those below."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the path may be that of the host, of which only the top is mounted.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base) and (left := _left(folder, *names)) is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes until the limit of a group; None without one."""
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = dict(line.split(" ", 1) for line in lines)
        cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
    except (OSError, KeyError, ValueError):  # no such group here, or "max"
        return None
    return most - used + cached
