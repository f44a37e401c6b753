"""How many threads a model gets on each system: read from what the systems answer, recorded or written down here."""

import os
import struct
import sys
from pathlib import Path

import pytest

from pocketlm.runtime import control_groups, memory, processors
from pocketlm.runtime.threads import check_threads, default_threads

# ---- control groups -------------------------------------------------------------------------------------------------


def system(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A root of a file system with what the kernel shows there."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """\
31 23 0:28 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid,nodev,noexec,relatime shared:15 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw,nosuid,nodev,noexec,relatime shared:16 - cgroup cgroup rw,memory
34 31 0:38 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw
"""
DOCKER_V1 = V1.replace(" / /sys/fs/cgroup/cpu,cpuacct", " /docker/0123 /sys/fs/cgroup/cpu,cpuacct").replace(
    " / /sys/fs/cgroup/memory", " /docker/0123 /sys/fs/cgroup/memory"
)
QUOTAS = {
    "docker --cpus=2, version 2, its own namespace": ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "no limit": ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "the root group of version 2, which has no such file": ("0::/\n", V2, {}, None),
    "a limit of the group above": (
        "0::/user.slice/user-1000.slice/session-2.scope\n",
        V2,
        {
            "sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/user-1000.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "800000 100000\n",
        },
        1.5,
    ),
    "the tightest of several": (
        "0::/a/b\n",
        V2,
        {"sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "60000 20000\n"},
        3,
    ),
    "version 1, as a service on the host": (
        "4:memory:/system.slice/x.service\n3:cpu,cpuacct:/system.slice/x.service\n0::/system.slice/x.service\n",
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/system.slice/x.service/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/system.slice/x.service/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "version 1 in a container, which is told its path on the host": (
        "5:cpu,cpuacct:/docker/0123\n0::/docker/0123\n",
        DOCKER_V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1, no limit": (
        "5:cpu,cpuacct:/\n",
        V1,
        {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "damaged files": ("0::/\nnonsense\n\n", V2 + "short - cgroup2\n- -\n", {"sys/fs/cgroup/cpu.max": "many 0\n"}, None),
    "a period of nothing": ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_the_tightest_share_of_time_is_found(tmp_path, name):
    groups, mounts, files, expected = QUOTAS[name]
    assert control_groups.processors(system(tmp_path, groups, mounts, files)) == expected


def test_without_proc_there_is_no_limit(tmp_path):
    assert control_groups.processors(tmp_path) is None
    assert control_groups.memory_left(tmp_path) is None


MEMORY = {
    "version 2, of the group above": (
        "0::/pod/container\n",
        V2,
        {
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/memory.current": "700\n",
            "sys/fs/cgroup/pod/memory.max": "5000\n",
            "sys/fs/cgroup/pod/memory.current": "1000\n",
        },
        4000,
    ),
    "version 1, in a container": (
        "5:memory:/docker/0123\n",
        DOCKER_V1,
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n"},
        7000,
    ),
    "version 1, in a group of its own": (
        "5:memory:/mine\n",
        V1,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": "3000\n",
            "sys/fs/cgroup/memory/mine/memory.usage_in_bytes": "1000\n",
        },
        2000,
    ),
    "version 2, mostly pages of files": (
        "0::/\n",
        V2,
        {
            "sys/fs/cgroup/memory.max": "5000\n",
            "sys/fs/cgroup/memory.current": "4900\n",
            "sys/fs/cgroup/memory.stat": "anon 900\nfile 4000\ninactive_file 3000\nactive_file 800\nslab 5\n",
        },
        3900,
    ),
    "version 1, mostly pages of files": (
        "5:memory:/\n",
        V1,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "8000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 5000\ntotal_active_file 1000\n",
        },
        7000,
    ),
    "no limit": ("0::/\n", V2, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, None),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_tightest_limit_of_memory_is_found(tmp_path, name):
    groups, mounts, files, expected = MEMORY[name]
    assert control_groups.memory_left(system(tmp_path, groups, mounts, files)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_containers_limit_bounds_the_free_memory(monkeypatch):
    free = memory.available_bytes()
    assert free
    monkeypatch.setattr(control_groups, "memory_left", lambda: free // 2)
    assert memory.available_bytes() == free // 2
    monkeypatch.setattr(control_groups, "memory_left", lambda: -5)  # above the limit already
    assert memory.available_bytes() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_systems_own_groups_are_read_where_the_kernel_shows_them():
    """Compared with a plain walk over the folders that are mounted."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        controller = "memory" if "memory" in names.split(",") else "cpu" if "cpu" in names.split(",") else None
        if controller and (folder := Path(f"/sys/fs/cgroup/{names}{path}")).is_dir():
            assert folder.resolve() in [group.resolve() for group in control_groups._groups(Path("/"), controller)]


@pytest.mark.parametrize(
    ("n_cores", "quota", "threads"),
    [(64, None, 64), (64, 2.0, 2), (64, 1.5, 2), (64, 1.4, 1), (64, 0.1, 1), (2, 8.0, 2), (4, 3.99, 4)],
)
def test_a_share_of_time_bounds_the_threads(n_cores, quota, threads):
    assert processors.within_quota(n_cores, quota) == threads


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_container_with_two_processors_on_a_large_machine_gets_two_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(processors, "linux_cores", len)
    monkeypatch.setattr(control_groups, "processors", lambda: 2.0)
    assert default_threads() == check_threads(None) == 2
    assert check_threads(16) == 16  # who asks for more gets more
    monkeypatch.setattr(control_groups, "processors", lambda: None)
    assert default_threads() == 64


def test_hyper_threads_of_a_core_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7"] * 2):
        path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(siblings + "\n")
    assert processors.linux_cores(range(8), tmp_path) == 4
    assert processors.linux_cores({0, 4, 1}, tmp_path) == 2
    assert processors.linux_cores({0, 90}, tmp_path) == 2  # of one the kernel says nothing


# ---- Windows: SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX ---------------------------------------------------------------


def core(*masks: tuple[int, int], efficiency: int = 0) -> bytes:
    """A record of one core; (mask, group) for every group it is in. One group: 48 bytes, as Windows 10 gives them."""
    body = struct.pack("<BB20xH", int(len(masks) == 1 and masks[0][0].bit_count() > 1), efficiency, len(masks))
    body += b"".join(struct.pack("<QH6x", mask, group) for mask, group in masks)
    return struct.pack("<II", 0, 8 + len(body)) + body


def other(relation: int, size: int) -> bytes:
    return struct.pack("<II", relation, size) + bytes(size - 8)


LAPTOP = b"".join(core((0b11 << 2 * i, 0)) for i in range(4))  # four cores, eight hyper-threads
HYBRID = LAPTOP + b"".join(core((1 << (8 + i), 0), efficiency=0) for i in range(4))  # and four small ones
ALL = (1 << 64) - 1
SERVER = b"".join(core((0b11 << 2 * i, group)) for group in (0, 1) for i in range(32))  # two groups of 64


def test_the_recorded_layout_is_the_one_that_windows_has():
    assert len(core((3, 0))) == 48  # sizeof on 64-bit Windows, https://learn.microsoft.com GetLogicalProcessorInformationEx
    assert core((3, 0))[32:42] == struct.pack("<QH", 3, 0)


@pytest.mark.parametrize(
    ("records", "allowed", "cores"),
    [
        (LAPTOP, {0: 0xFF}, 4),
        (LAPTOP, {0: 0b1111}, 2),  # `start /affinity f`
        (LAPTOP, {0: 0b0101}, 2),  # a hyper-thread of each of two cores
        (LAPTOP, {0: 0b0011}, 1),
        (HYBRID, {0: 0xFFF}, 8),
        (SERVER, {0: ALL, 1: ALL}, 64),  # Windows 11: a process is in every group
        (SERVER, {1: ALL}, 32),  # before: in one
        (SERVER, {1: 0xF}, 2),
        (other(2, 64) + LAPTOP + other(3, 100), {0: 0xFF}, 4),  # caches and packages between them
        (b"", {0: 0xFF}, 0),
    ],
)
def test_cores_of_windows_records(records, allowed, cores):
    assert processors.windows_cores(records, allowed) == cores


@pytest.mark.parametrize("damage", [LAPTOP[:-1], LAPTOP[:52], struct.pack("<II", 0, 0) + bytes(40), core((3, 0))[:32]])
def test_damaged_records_are_refused_and_not_walked_for_ever(damage):
    with pytest.raises(ValueError):
        processors.windows_cores(damage, {0: 0xFF})


# ---- macOS, and what holds everywhere -------------------------------------------------------------------------------


def test_macs_count_their_fast_cores():
    apple = {b"hw.perflevel0.physicalcpu": 4, b"hw.physicalcpu": 8, b"hw.logicalcpu": 8}
    intel = {b"hw.physicalcpu": 6, b"hw.logicalcpu": 12}
    assert processors.darwin_cores(apple.get) == 4
    assert processors.darwin_cores(intel.get) == 6
    assert processors.darwin_cores({}.get) == 0


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin", "freebsd14"])
def test_a_system_that_does_not_answer_gets_what_python_counts(monkeypatch, platform):
    def refuses():
        raise OSError

    monkeypatch.setattr(sys, "platform", platform)
    for name in ("_linux", "_windows", "_darwin"):
        monkeypatch.setattr(processors, name, refuses)
    assert processors.cores() == (os.cpu_count() or 1)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors.cores() == 1


def test_the_other_systems_own_calls_fail_gracefully_here(monkeypatch):
    """ctypes has no WinDLL on Linux, and the C library no sysctlbyname: neither ends in a traceback."""
    for platform in {"win32", "darwin"} - {sys.platform}:
        monkeypatch.setattr(sys, "platform", platform)
        assert processors.cores() == (os.cpu_count() or 1)
