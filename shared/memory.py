"""How much memory there is to take, of the machine and of the container around this process."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """What new allocations may have before something is swapped out or killed."""
    available: int = psutil.virtual_memory().available
    limit = _container_room()
    return available if limit is None else min(available, limit)


def _container_room() -> int | None:
    """Below the limits of this process's control groups (version 2); None: no limit."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        return None
    rooms = []
    group = _CGROUP / own
    while group == _CGROUP or _CGROUP in group.parents:
        room = _room_in(group)
        if room is not None:
            rooms.append(room)
        group = group.parent
    return min(rooms, default=None)


def _room_in(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        # Files that were read stay in memory until somebody needs it.
        counters = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = next((int(value) for name, value in counters if name == "inactive_file"), 0)
        return max(0, int(limit) - used + cache)
    except (OSError, ValueError):
        return None
