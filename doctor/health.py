"""Heat, power and speed of the processor, at this moment and since it was switched on.

In: files under /sys and, on a Raspberry Pi, what `vcgencmd get_throttled` prints. Out: a `Health`. Knows no models.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pocketlm.runtime.small_files import number, text

# bits of get_throttled: Raspberry Pi's documentation of vcgencmd. The same, 16 bits higher, for "has been so since the start"
_BITS = ("power is too weak", "the frequency is capped", "it is throttled", "the soft limit of temperature is reached")


@dataclass(frozen=True)
class Health:
    """`now`, `before`: what holds the processor back, and what has done so since it was switched on. None: cannot be told."""

    now: tuple[str, ...] | None
    before: tuple[str, ...] | None
    celsius: float | None  # the hottest sensor of the processor
    governor: str  # "" where there is none
    megahertz: tuple[int, int, int] | None  # now, allowed at most, possible at most


def health(root: Path = Path("/"), vcgencmd: str | None = None) -> Health:
    """`vcgencmd`: what it printed; asked for here where it is None."""
    flags = throttled(root, vcgencmd)
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    fast = max(policies, key=lambda folder: number(folder / "cpuinfo_max_freq") or 0, default=root / "none")
    current, allowed, possible = (
        (number(fast / name) or 0) // 1000 for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
    )
    return Health(
        None if flags is None else named(flags), None if flags is None else named(flags >> 16), _celsius(root),
        text(fast / "scaling_governor"), (current, allowed, possible) if current and allowed and possible else None,
    )  # fmt: skip


def throttled(root: Path = Path("/"), vcgencmd: str | None = None) -> int | None:
    """The flags of get_throttled: of the firmware's file, or of the command; None where the machine has neither.

    Machines of other makers count how often a core was throttled: bits 2 and 18 then.
    """
    for place in ("sys/devices/platform/soc/soc:firmware/get_throttled", "sys/firmware/get_throttled"):
        if (flags := number(root / place, 16)) is not None:
            return flags
    printed = _ask() if vcgencmd is None and root == Path("/") else vcgencmd or ""
    if match := re.search(r"throttled=0x([0-9a-fA-F]+)", printed):
        return int(match[1], 16)
    alarms = [number(path) for path in root.glob("sys/class/hwmon/hwmon*/in0_lcrit_alarm")]  # rpi_volt: too weak
    counts = [number(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")]
    if not alarms and not counts:
        return None
    return (1 if any(alarms) else 0) | (1 << 18 if any(counts) else 0)


def named(flags: int) -> tuple[str, ...]:
    """What the four lowest bits say."""
    return tuple(name for bit, name in enumerate(_BITS) if flags >> bit & 1)


class Throttling:
    """Whether the processor is slowed down while a model runs. Each call of `note` looks."""

    def __init__(self, root: Path = Path("/")):
        self._root, self._told = root, ()
        self._asks = root != Path("/") or shutil.which("vcgencmd") is not None
        self._counted = self._count()

    def note(self) -> str:
        """One line where that is new, "" else."""
        flags, counted = throttled(self._root, None if self._asks else ""), self._count()
        now = named(flags or 0)
        if counted > self._counted and "it is throttled" not in now:
            now = (*now, "it was throttled meanwhile")
        said, self._told, self._counted = self._told, now, counted
        if not set(now) - set(said):
            return ""
        celsius = _celsius(self._root)
        heat = f" ({celsius:.0f} °C)" if celsius else ""
        return f"the processor is slowed down: {', '.join(now)}{heat}; pocketlm doctor says what helps"

    def _count(self) -> int:
        """How often that has happened, where the machine counts it."""
        paths = self._root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
        return sum(number(path) or 0 for path in paths)


def _ask() -> str:
    try:
        return subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=2, check=False, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""


def _celsius(root: Path) -> float | None:
    """Of the zones that are named after the processor, or of all."""
    zones = [(text(zone / "type").lower(), number(zone / "temp")) for zone in root.glob("sys/class/thermal/thermal_zone*")]
    zones = [(kind, value) for kind, value in zones if value is not None and 0 < value < 150_000]
    own = [zone for zone in zones if any(word in zone[0] for word in ("cpu", "soc", "x86_pkg", "package", "core"))]
    return max((value / 1000 for _, value in own or zones if value), default=None)
