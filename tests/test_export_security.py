"""A checkpoint from a stranger cannot run code, nor exhaust the machine: payloads and bombs."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import pytest
from hostile_checkpoints import NAMES, TENSOR, VALUES, WAYS, refused, short, text, torch_zip

from pocketlm.errors import FileError
from pocketlm.export import checkpoint
from pocketlm.export.checkpoint import open_checkpoint, plain
from pocketlm.pickle_reader import read_pickle


class Events(list[str]):
    """The audit events of a stretch of code. A hook cannot be taken away again, so one is kept and switched."""

    _active: Events | None = None
    _hooked = False

    def __enter__(self) -> Events:
        if not Events._hooked:
            sys.addaudithook(lambda name, args: Events._active.append(name) if Events._active is not None else None)
            Events._hooked = True
        Events._active = self
        return self

    def __exit__(self, *_: object) -> None:
        Events._active = None


# ── code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS)
def test_every_published_call_is_refused_by_its_name(way: str, tmp_path: Path) -> None:
    for module, name in NAMES:
        shown = f"{module}.{name}".replace("__builtin__", "builtins")
        assert f"call {shown}" in refused(tmp_path / "ckpt.pt", torch_zip(WAYS[way](module, name))), (module, name)


def test_reading_a_hostile_pickle_causes_no_event_at_all() -> None:
    payloads = [make(module, name) for make in WAYS.values() for module, name in NAMES]
    with Events() as events:
        for payload in payloads:
            try:
                read_pickle(payload, "x.pt", {})
            except FileError:
                continue
            raise AssertionError("not refused")
    assert events == []


def test_opening_a_checkpoint_opens_nothing_but_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(torch_zip(WAYS["STACK_GLOBAL"]("os", "system")))
    with Events() as events, pytest.raises(FileError):
        open_checkpoint(path)
    assert set(events) <= {"open", "mmap.__new__"}
    assert events.count("open") == 1


def test_the_same_payloads_in_the_old_format_are_refused(tmp_path: Path) -> None:
    for module, name in NAMES:
        payload = WAYS["GLOBAL and REDUCE"](module, name)
        old = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + payload
        assert "wants to call" in refused(tmp_path / "old.pt", old)


@pytest.mark.parametrize("way", ["GLOBAL and REDUCE", "protocol 0", "INST", "OBJ"])
def test_a_bare_pickle_is_refused_by_the_name_too(way: str, tmp_path: Path) -> None:
    payload = WAYS[way]("os", "system")
    if way == "INST":
        payload = b"(ios\nsystem\n."
    assert "call os.system" in refused(tmp_path / "ckpt.pt", payload)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"\x80\x02\x82\x01.", "extension 1"),
        (b"\x80\x02\x83\x01\x02.", "extension 513"),
        (b"\x80\x02cos\nsystem\n}b.", "os.system.__setstate__"),
        (b"\x80\x04cmain\nThing\n)}" + short("x") + b"K\x01s\x92.", "keyword arguments"),
        (b"\x80\x02X\x05\x00\x00\x00hello)R.", "call str"),
        (b"\x80\x02}(R.", "damaged"),
        (b"\x80\x05\x97.", "damaged"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00](h\x00Nh\x00}eR.", "damaged"),
    ],
)
def test_rarer_opcodes(payload: bytes, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path / "ckpt.pt", torch_zip(payload))


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    message = refused(tmp_path / "ckpt.pt", torch_zip(WAYS["STACK_GLOBAL"]("os\x1b[2J\r\n", "system\u202e")))
    assert message.isascii()
    assert message.isprintable()


def test_objects_of_unknown_classes_are_plain_data() -> None:
    pickled = (
        b"\x80\x02csome.where\nConfig\n)\x81}("
        + text("n_head")
        + b"K\x04"
        + text("inner")
        + b"cother\nKind\n)\x81}"
        + text("x")
    )
    tree, _ = read_pickle(pickled + b"K\x01sbub.", "x.pt", {})
    assert plain(tree) == {"n_head": 4, "inner": {"x": 1}}


# ── bombs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SHARED_TUPLES = b"\x80\x02)" + b"2\x86" * 60_000 + b"."  # each the pair of the one before: 2^60000 leaves
BOMBS = {
    "tuples of themselves": SHARED_TUPLES,
    "as weights": b"\x80\x02}" + text("model") + b"}" + text("w") + SHARED_TUPLES[2:-1] + b"ss.",
    "as a key": b"\x80\x02}" + SHARED_TUPLES[2:-1] + b"K\x01s.",
    "as a device": b"\x80\x02ctorch\ndevice\n" + SHARED_TUPLES[2:-1] + b"\x85R.",
    "as a size": b"\x80\x02ctorch\nSize\n" + SHARED_TUPLES[2:-1] + b"\x85R.",
    "dicts of themselves": b"\x80\x02}q\x00" + text("a") + b"h\x00s" + text("b") + b"h\x00s.",
    "lists of themselves": b"\x80\x02](q\x00" + b"h\x00" * 200 + b"e.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(1000) + b".",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a long decimal": b"I" + b"9" * 100_000 + b"\n.",
    "a text longer than the file": b"\x80\x04\x8d" + b"\xff" * 8 + b"x.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "marks": b"(" * 300_000,
    "a set copied again and again": (
        b"\x80\x02](" + b"".join(b"M" + struct.pack("<H",
        i) for i in range(60_000)) + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R0" * 20_000 + b"N."
    ),
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_soon_with_one_line(bomb: str, tmp_path: Path) -> None:
    refused(tmp_path / "ckpt.pt", torch_zip(BOMBS[bomb]))  # if it were not stopped: for ever, or all of the memory


@pytest.mark.parametrize("entry", ["model", "config"])
def test_a_few_lists_that_hold_each_other_are_not_walked_through_a_million_times(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = b"}" + text("n_head") + b"K\x04s" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(40))  # 2^40 dicts
    pickled = b"\x80\x02}(" + text(entry) + b"}" + text("w") + shared + b"s" + text("weights") + TENSOR[2:-1] + b"u."
    steps: list[object] = []
    walked = checkpoint._Steps.to
    monkeypatch.setattr(checkpoint._Steps, "to", lambda self, value: steps.append(value) or walked(self, value))
    (tmp_path / "ckpt.pt").write_bytes(torch_zip(pickled, {"0": VALUES.tobytes()}))
    try:
        open_checkpoint(tmp_path / "ckpt.pt")
    except FileError as error:
        assert "too large or too deep" in str(error)  # noqa: PT017
    assert len(steps) < 1_000_000


def test_a_pickle_of_too_many_instructions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.pickle_reader.MAX_OPCODES", 1000)
    assert "more than 1000 instructions" in refused(tmp_path / "ckpt.pt", torch_zip(b"N0" * 1000 + b"."))
