"""What `pocketlm doctor` says of recorded machines and of this one: what it is, what fits, what to change."""

from __future__ import annotations

import json
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from boards import BOARDS, write
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.doctor import board, health, models, resources
from pocketlm.doctor.advice import Facts, advice
from pocketlm.doctor.command import describe
from pocketlm.errors import PocketlmError
from pocketlm.runtime.native import levels

MB = 10**6


@pytest.mark.parametrize("name", BOARDS)
def test_a_recorded_board_is_recognised(tmp_path, name):
    recorded = BOARDS[name]
    found = board.board(write(recorded, tmp_path), recorded.machine, recorded.bits)
    assert (found.model, found.cores) == recorded.expected
    assert found.is_raspberry_pi == recorded.expected[0].startswith("Raspberry")


@pytest.mark.parametrize("name", BOARDS)
def test_a_recorded_board_gets_the_level_it_can_run(tmp_path, monkeypatch, name):
    recorded = BOARDS[name]
    write(recorded, tmp_path)
    monkeypatch.setattr(levels, "_CPUINFO", str(tmp_path / "proc/cpuinfo"))
    monkeypatch.setattr(levels.platform, "machine", lambda: recorded.machine)
    monkeypatch.setattr(levels.struct, "calcsize", lambda _: recorded.bits // 8)
    monkeypatch.setattr(sys, "platform", "linux")
    if recorded.level:
        assert levels.detect().name == recorded.level
        return
    with pytest.raises(PocketlmError, match="64-bit system: Raspberry Pi OS"):
        levels.detect()


def facts(tmp_path: Path, name: str, **changes) -> Facts:
    """Those of a board that is well, with changes."""
    recorded = BOARDS[name]
    found = board.board(write(recorded, tmp_path), recorded.machine, recorded.bits)
    well = health.Health((), (), 48.0, "ondemand", (1500, 1800, 1800))
    memory = resources.Memory(3800 * MB, 3400 * MB, None, 100 * MB, 0, 0, 4096)
    return replace(Facts(found, well, memory, "SD card", 85e6, recorded.level, "", 4, 4e9, ()), **changes)


def test_a_board_that_is_well_has_nothing_to_change(tmp_path):
    assert advice(facts(tmp_path, "Pi 5")) == []
    assert describe(facts(tmp_path / "again", "Pi 5")).endswith("Nothing to change.")


SYSTEMS = {
    "Pi 4, 32-bit Python on a 64-bit kernel": "32 bits on a 64-bit kernel",
    "Pi 4, 32 bits": "this board can run 64",
    "Zero 2 W, 32 bits": "this board can run 64",
    "Zero W": "take a board with 64 bits",
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_of_32_bits_gets_one_sentence_that_says_what_to_do(tmp_path, name):
    found = advice(facts(tmp_path, name))
    assert len(found) == 1
    assert SYSTEMS[name] in found[0]


# vcgencmd's output → what is so now, what was so before: bits 0 to 3, 16 to 19
THROTTLED = {
    "throttled=0x0\n": ((), ()),
    "throttled=0x50000\n": ((), ("power is too weak", "it is throttled")),
    "throttled=0x50005\n": (("power is too weak", "it is throttled"), ("power is too weak", "it is throttled")),
    "throttled=0x20002": (("the frequency is capped",), ("the frequency is capped",)),
    "throttled=0xe0008\n": (
        ("the soft limit of temperature is reached",),
        ("the frequency is capped", "it is throttled", "the soft limit of temperature is reached"),
    ),
    "VCHI initialization failed\n": (None, None),
    "error=1 error_msg=\"Command not registered\"\n": (None, None),
    "": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("printed", THROTTLED)
def test_what_vcgencmd_prints_is_understood(tmp_path, printed):
    found = health.health(tmp_path, printed)
    assert (found.now, found.before) == THROTTLED[printed]


def test_throttling_is_also_read_from_the_kernel(tmp_path):
    place = tmp_path / "sys/devices/platform/soc/soc:firmware"
    place.mkdir(parents=True)
    (place / "get_throttled").write_text("50005\n")
    assert health.throttled(tmp_path, "") == 0x50005


def test_the_kernels_alarm_of_the_supply_is_read(tmp_path):
    alarm = tmp_path / "sys/class/hwmon/hwmon1"
    alarm.mkdir(parents=True)
    for value, now in (("0\n", ()), ("1\n", ("power is too weak",))):
        (alarm / "in0_lcrit_alarm").write_text(value)
        assert health.health(tmp_path, "").now == now


def test_heat_and_speed_are_those_of_the_processor(tmp_path):
    for zone, (kind, value) in enumerate([("gpu-thermal", "91000"), ("cpu-thermal", "61234"), ("cpu-thermal", "-1")]):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "type").write_text(kind + "\n")
        (folder / "temp").write_text(value + "\n")
    for policy, fastest in (("policy0", 1800), ("policy4", 2400)):
        folder = tmp_path / "sys/devices/system/cpu/cpufreq" / policy
        folder.mkdir(parents=True)
        for file, megahertz in (("cur", fastest // 2), ("max", fastest - 400)):
            (folder / f"scaling_{file}_freq").write_text(f"{megahertz * 1000}\n")
        (folder / "cpuinfo_max_freq").write_text(f"{fastest * 1000}\n")
        (folder / "scaling_governor").write_text("powersave\n")
    found = health.health(tmp_path, "throttled=0x0")
    assert found == health.Health((), (), 61.234, "powersave", (1200, 2000, 2400))
    said = "\n".join(advice(facts(tmp_path / "board", "Pi 5", health=found)))
    assert "scaling_governor" in said
    assert "2000 MHz, of 2400" in said


WRONG = {
    "the power supply is too weak": {"health": health.Health(("power is too weak", "it is throttled"), (), 50, "", None)},
    "slowed down by heat": {"health": health.Health(("it is throttled",), ("it is throttled",), 86, "", None)},
    "the power was too weak": {"health": health.Health((), ("power is too weak",), 50, "", None)},
    "was slowed down by heat since": {"health": health.Health((), ("it is throttled",), 60, "", None)},
    "has 79 °C": {"health": health.Health((), (), 79.2, "", None)},
    "300 MB are swapped out": {"memory": resources.Memory(900 * MB, 80 * MB, None, 900 * MB, 300 * MB, 0, 4096)},
    "without a desktop": {"fits": (models.Fit(Path("m.gguf"), 900 * MB, 0, 4096, 700 * MB, 5.0),)},
    "--ctx N": {"fits": (models.Fit(Path("m.gguf"), 900 * MB, 512, 4096, 700 * MB, 5.0),)},
    "read at 22 MB/s": {"storage_speed": 22e6},
    "no compiled code here": {"level": "", "level_problem": "this system refuses"},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_gets_one_sentence(tmp_path, said):
    found = advice(facts(tmp_path, "Pi 4, 64 bits", **WRONG[said]))
    assert len(found) == 1
    assert said in found[0]


MEMINFO = "MemTotal:         927980 kB\nMemFree:           72000 kB\nMemAvailable:     104448 kB\nSwapTotal: 925692 kB\n"
SWAPS = (
    "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/var/swap\tfile\t\t925692\t\t452608\t\t-2\n"
    "/dev/zram0                              partition\t463856\t\t12\t\t100\n"
)


def test_memory_swap_and_compressed_swap_are_told_apart(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    (tmp_path / "proc/swaps").write_text(SWAPS)
    found = resources.memory_of(tmp_path)
    assert (found.total, found.free) == (927980 << 10, 104448 << 10)
    assert (found.swap, found.swap_used, found.zram) == (925692 << 10, 452608 << 10, 463856 << 10)
    nothing = resources.memory_of(tmp_path / "nothing")
    assert (nothing.total, nothing.free, nothing.swap) == (None, None, None)


STORAGE = {
    "SD card": ("devices/platform/emmc2bus/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0", {"device/type": "SD\n"}),
    "eMMC": ("devices/platform/fe310000.mmc/mmc_host/mmc0/mmc0:0001/block/mmcblk0", {"device/type": "MMC\n"}),
    "NVMe": ("devices/platform/axi/1000110000.pcie/pci0000:00/nvme/nvme0/nvme0n1", {}),
    "USB": ("devices/platform/axi/usb2/2-1/2-1:1.0/host0/target0:0:0/block/sda", {"queue/rotational": "0\n"}),
    "disk that turns": ("devices/pci0000:00/ata1/host0/target0:0:0/block/sda", {"queue/rotational": "1\n"}),
    "flash": ("devices/pci0000:00/ata1/host0/target0:0:0/block/sda", {"queue/rotational": "0\n"}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="links as Linux's /sys has them")
@pytest.mark.parametrize("kind", STORAGE)
def test_the_kind_of_storage_is_told(tmp_path, kind):
    place, files = STORAGE[kind]
    whole = tmp_path / "sys" / place
    (whole / "part2").mkdir(parents=True)
    (whole / "queue").mkdir()
    for name, content in files.items():
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text(content)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/179:2").symlink_to(whole / "part2")
    assert resources.storage(tmp_path, tmp_path, (179 << 8) | 2) == kind


def test_what_fits_is_what_loads(tmp_path, monkeypatch):
    """The doctor's figures are those that opening a model goes by."""
    path = write_model(tmp_path / "model.gguf", n_embd=256, n_head=8, n_ctx=8192)
    all_of_it = models.fit(path, None, None, 2)
    assert (all_of_it.n_ctx, all_of_it.wanted, all_of_it.tokens_per_second) == (4096, 4096, None)
    for free in (all_of_it.needs, all_of_it.needs - 1, all_of_it.needs // 2, MB // 2):
        monkeypatch.setattr("pocketlm.runtime.memory.available_bytes", lambda free=free: free)
        found = models.fit(path, free, 1e9, 2)
        assert found.tokens_per_second == pytest.approx(1e9 / found.read)
        if found.n_ctx:
            pocketlm.load(path, backend="native", threads=2, ctx=found.n_ctx).close()
        else:
            with pytest.raises(PocketlmError, match="MB are free"):
                pocketlm.load(path, backend="native", threads=2, ctx=256)


def test_a_file_that_is_no_model_is_said_to_be_none(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(5))
    assert "version 0" in models.fit(tmp_path / "broken.gguf", None, None, 1).problem


def test_the_command_tells_of_this_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "mine.gguf")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "mine.gguf" in said
    row = re.search(r"small-talk\.gguf +(3\.\d MB) +\d\.\d MB ", said)  # no "0 MB" for models of this size
    assert row
    assert main(["inspect", "small-talk"]) == 0
    assert f"each reads {row[1]} of weights" in capsys.readouterr().out
    assert "tokens/s" in said
    assert main(["doctor", "mine.gguf", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["board"]["bits"] == 8 * struct.calcsize("P")
    assert found["memory_speed"] > 1e8
    assert [Path(fit["path"]).name for fit in found["fits"]] == ["mine.gguf"]
    assert isinstance(found["advice"], list)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(5))
    assert main(["doctor"]) == 0  # nobody asked for that one
    for more in ([], ["--json"]):
        assert main(["doctor", "mine.gguf", "nothing.gguf", *more]) == 1
        said = capsys.readouterr().out
        assert "mine.gguf" in said
        assert "nothing.gguf" in said
