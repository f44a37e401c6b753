"""The limits of this process's control groups (Linux): how much memory a container may take, and how much processor time.

In: files under /proc and /sys. Out: numbers. A limit may stand in any group above the process's own, so all of them are
read. Versions 1 and 2 of control groups, and both at once: https://docs.kernel.org/admin-guide/cgroup-v2.html. Every function
takes the root of the file system, so that it can read a copy.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pocketlm.runtime.small_files import number, text, whole


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken before the tightest limit is reached; None where there is no limit.

    Cached pages of files count as left, though the kernel counts them as used: it gives them up as soon as a program wants
    memory. Otherwise the model's own file, read once, would leave no room for the model.
    """
    left = []
    for folder, limit, used, files in (
        *((folder, "memory.max", "memory.current", "") for folder in _groups(root, "")),
        *((folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_") for folder in _groups(root, "memory")),
    ):
        if (most := number(folder / limit)) is not None and (now := number(folder / used)) is not None:
            rows = dict(line.split(" ", 1) for line in text(folder / "memory.stat").splitlines() if " " in line)
            kept = sum(whole(rows.get(f"{files}{kind}_file", "")) or 0 for kind in ("active", "inactive"))
            left.append(most - max(now - kept, 0))
    return min(left, default=None)


def processors(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that may be used: `docker run --cpus=1.5` gives 1.5; None where there is no limit."""
    shares = []
    for folder in _groups(root, ""):
        quota, _, period = text(folder / "cpu.max").partition(" ")  # "200000 100000", or "max 100000"
        shares.append((whole(quota), whole(period)))
    for folder in _groups(root, "cpu"):
        shares.append((number(folder / "cpu.cfs_quota_us"), number(folder / "cpu.cfs_period_us")))  # -1: no limit
    return min((quota / period for quota, period in shares if quota and period and min(quota, period) > 0), default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the process's group and of all above it, in the hierarchy of `controller`; in version 2's if that is ""."""
    found = []
    for line in text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]  # "4:cpu,cpuacct:/docker/abc", version 2: "0::/docker/abc"
        if controller not in names.split(","):
            continue
        for top, mount in _mounts(root, controller):
            own = PurePosixPath(path)
            # a container sees the hierarchy from its own group down, and may be told its path from the host's root
            below = own.relative_to(top) if own.is_relative_to(top) else PurePosixPath()
            found += [root / mount.relative_to("/") / group for group in (below, *below.parents)]
    return found


def _mounts(root: Path, controller: str) -> list[tuple[PurePosixPath, PurePosixPath]]:
    """(group at the root of the mount, mount point) of each hierarchy with `controller`; of version 2's if that is ""."""
    found = []
    for line in text(root / "proc/self/mountinfo").splitlines():
        # 36 31 0:33 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
        own, _, system = line.partition(" - ")
        kind, _, options = [*system.split(" ", 2), "", ""][:3]
        wanted = kind == "cgroup2" if not controller else kind == "cgroup" and controller in options.split(",")
        if wanted and len(fields := own.split(" ")) >= 5:
            found.append((PurePosixPath(fields[3]), PurePosixPath(fields[4])))
    return found
