"""`pocketlm pack`, `unpack`, `persona`, `check` and `stub`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pocketlm.build.persona import UIS, Persona, from_bytes
from pocketlm.cli_options import SAMPLING, cache_argument
from pocketlm.errors import FileError, PocketlmError, UsageError, one_of, whole_number
from pocketlm.export.command import inputs, model_options, own_keys, read_importance, read_model
from pocketlm.runtime import container
from pocketlm.runtime.atomic import check_file, check_other, check_room, replacing_file
from pocketlm.runtime.gguf_reader import GGUF, open_gguf
from pocketlm.runtime.kv_cache import KINDS
from pocketlm.runtime.model_file import PART, open_model, parts_of, size_of
from pocketlm.terminal_text import print

SMALLEST = 9 << 20  # bytes that any stub has
TEXTS = {
    "title": "what the first line calls the model",
    "system": "what the model is told before every conversation",
    "greeting": "what the executable says first",
}


class Command(NamedTuple):
    """A subcommand: what it takes, what it does (returning the exit status)."""

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _persona_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the executable says, and how it answers")
    for name, text in TEXTS.items():
        group.add_argument(f"--{name}", metavar="TEXT", help=text)
    for flag, (_, kind, text) in SAMPLING.items():
        group.add_argument(flag, type=kind, metavar="X" if kind is float else "N", help=text)
    cache_argument(group)
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument("--ui", choices=UIS, help="where it talks: in the terminal (chat, the default) or in the browser (web)")


def _texts(arguments: argparse.Namespace) -> dict[str, str | None]:
    return {name: getattr(arguments, name) for name in (*TEXTS, "ui")}


def _flags(arguments: argparse.Namespace) -> dict[str, float | str]:
    """The sampling flags that were given, checked as the chat would check them."""
    from pocketlm.runtime.sampling_options import MAX_TOKENS, SamplingOptions

    values = {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in (*SAMPLING, "--max-tokens", "--kv")}
    given = {flag: value for flag, value in values.items() if value is not None}
    SamplingOptions(**{SAMPLING[flag][0]: value for flag, value in given.items() if flag in SAMPLING})
    one_of("kv", str(given.get("--kv", KINDS[0])), KINDS)
    whole_number("--max-tokens", given.get("--max-tokens", 1), 1, MAX_TOKENS)
    return given


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GGUF, an fp16 bin, a checkpoint, or an installed model's short name")
    parser.add_argument("-o", "--output", required=True, metavar="FRIEND", help="the executable to write")
    parser.add_argument("--stub", metavar="PATH", help="a stub, or a packed executable; default: this platform's own")
    _for_arguments(parser)
    parser.add_argument("--icon", metavar="FILE", help="what Windows shows: an .ico, or a square .png")
    model_options(parser.add_argument_group("what the model becomes first, as in pocketlm export"))
    _persona_arguments(parser)


def _for_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--for", dest="target", metavar="NAME",
                        help="windows, macos, linux, pi, all, or linux-x86_64 and the like; default: this system")  # fmt: skip
    parser.add_argument("--wheels", metavar="FOLDER", help="take the wheels that make a stub from here, not from the network")


def _pack(arguments: argparse.Namespace) -> int:
    from pocketlm.build.icon import images
    from pocketlm.build.pack import name_for, open_stub, pack, with_texts

    if arguments.stub and arguments.target:
        raise UsageError("pack: give only one of --stub and --for")
    persona = with_texts(Persona(), _texts(arguments), _flags(arguments))
    given = open_stub(Path(arguments.stub)) if arguments.stub else None
    names = (given.platform,) if given else _platforms(arguments)
    outs = [Path(arguments.output if len(names) == 1 else f"{arguments.output}-{name}") for name in names]
    outs = [name_for(name, out) for name, out in zip(names, outs, strict=True)]
    with _as_gguf(arguments, outs) as model:
        if not given:  # before half a minute's work
            check_room(Path(arguments.output), len(names) * (model.stat().st_size + SMALLEST))
        icons = images(Path(arguments.icon)) if arguments.icon else None
        with open_gguf(model) as source:  # what cannot be packed is found before anything is fetched
            reference = _reference(source)
        for name, out in zip(names, outs, strict=True):
            stub = given or open_stub(_stub_for(name, arguments))
            said: list[str] = []
            pack(model, stub, out, persona, reference, lambda part, to=said: to.append(_try(part)), icons)
            print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", *said, sep="\n")
    return 0


def _platforms(arguments: argparse.Namespace) -> tuple[str, ...]:
    from pocketlm.build.compose import platforms
    from pocketlm.build.sources import host_platform

    return platforms(arguments.target) if arguments.target else (host_platform(),)


def _stub_for(name: str, arguments: argparse.Namespace) -> Path:
    from pocketlm.build.compose import kept_stub

    return kept_stub(name, Path(arguments.wheels) if arguments.wheels else None)


def _try(executable: Path) -> str:
    """Run the finished executable's self-test; the line to print about it. Raises PocketlmError if it fails."""
    from pocketlm.build.pack import platform_of
    from pocketlm.build.sources import host_platform

    platform = platform_of(executable)
    if platform != host_platform() or platform == "macos-arm64":  # which runs nothing that is not signed
        return f"not tried here: it is for {platform}; --selftest tries it there"
    try:
        done = subprocess.run([executable, "--selftest"], capture_output=True, text=True, encoding="utf-8", errors="replace")
    except (PermissionError, FileNotFoundError) as error:  # a folder that may hold no programs; another C library
        return f"not tried: this computer does not start it there ({error.strerror})"
    except OSError as error:
        raise PocketlmError(f"the finished executable is none that this system starts ({error.strerror})") from None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    said = lines[-1] if lines else f"it ended with status {done.returncode}"
    if done.returncode:
        wrong = said.removeprefix("WRONG: ").split(", ")
        why = [" ".join(line.split()) for line in done.stdout.splitlines() if line.partition(" ")[0] in wrong]
        raise PocketlmError(f"the finished executable does not pass its own test: {'; '.join(why) or said}")
    return f"tried: {said}"


def _reference(file: GGUF) -> bytes:
    """The reference results for --selftest. Raises FileError for a model that cannot hold a conversation."""
    from pocketlm.build.selftest import reference
    from pocketlm.export.tokenizer_data import test_texts
    from pocketlm.runtime.plan import read_plan
    from pocketlm.tokenizer import from_metadata

    read_plan(file.metadata, file.tensors, file.path)
    return reference(file, test_texts(from_metadata(file.metadata, file.path)))


@contextmanager
def _as_gguf(arguments: argparse.Namespace, outs: Sequence[Path]) -> Iterator[Path]:
    """The model as a GGUF file: converted into a temporary one if it is anything else, or if options change it."""
    from pocketlm.export.from_model_file import is_model_file
    from pocketlm.model import find_model

    path = find_model(arguments.model)
    if not path.exists():
        raise FileError(path, "there is no such file", "check the path")
    for out in outs:
        check_other(out, inputs(arguments, path))
        check_file(out)
    keep = not any(getattr(arguments, name) for name in ("quant", "pure", "imatrix", "set", "map", "tokenizer", "lora"))
    own, is_gguf = own_keys(arguments), path.is_file() and (is_model_file(path) or path.suffix.lower() == ".gguf")
    if is_gguf and keep and not own and not container.is_program(path) and len(parts_of(path)) == 1:
        yield path
        return
    output = Path(arguments.output)
    check_room(output, 0)
    # beside the executable: a system's folder for temporary files may be in memory
    with tempfile.TemporaryDirectory(prefix=".pocketlm-", dir=output.parent) as temporary:
        out = Path(temporary, f"{_stem(path)}.gguf")  # a model without a name of its own has its file's
        if is_gguf and keep:
            _with_keys(path, own, out)
        else:
            from pocketlm.export.export import export

            model = read_model(arguments, path)
            for note in model.notes:
                print(f"note: {note}")
            counts = read_importance(arguments, model)
            export(model, path, out, quant=arguments.quant, pure=arguments.pure, importance=counts)
        yield out


def _stem(path: Path) -> str:
    """A name for the model, from its file or its parts, that every file system accepts."""
    stem = path.stem if path.is_file() and not container.is_program(path) else path.name
    part = PART.fullmatch(stem)
    return os.fsencode(part[1] if part else stem)[:200].decode("utf-8", "ignore") or "model"


def _with_keys(model: Path, own: dict[str, str], out: Path) -> None:
    """Write `out`, a copy of the model with the keys `own`; the weights stay as they are."""
    from pocketlm.export.gguf_writer import copy_gguf

    if container.is_program(model):
        from pocketlm.build.pack import unpack

        program, model = model, out.with_suffix(".unpacked")
        unpack(_find(str(program)), model)
    with open_model(model) as source, replacing_file(out, size_of(model)) as part, open(part, "xb") as file:
        metadata = {key: value for key, value in source.metadata.items() if not key.startswith("split.")}
        copy_gguf(file, {**metadata, **own}, source.tensors)


def _find(path: str) -> container.Packed:
    if not Path(path).exists():
        raise FileError(path, "there is no such file", "check the path")
    packed = container.find(Path(path)) if container.is_program(Path(path)) else None
    if packed is None:
        raise FileError(path, "is not a packed executable, or is damaged", "name one that pocketlm pack has made")
    return packed


def _unpack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FRIEND", help="a packed executable")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the GGUF to write")


def _unpack(arguments: argparse.Namespace) -> int:
    from pocketlm.build.pack import unpack

    packed, out = _find(arguments.file), Path(arguments.output)
    check_other(out, [packed.path])
    n_bytes = unpack(packed, out)
    print(f"{arguments.output}: {n_bytes / 1e6:.1f} MB")
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a packed executable, of any system, or a model file")


def _check(arguments: argparse.Namespace) -> int:
    from pocketlm.build.check import parts_of
    from pocketlm.model import find_model

    parts = parts_of(find_model(arguments.file))
    for part in parts:
        print(part.line())
    if wrong := [part.name for part in parts if not part.is_whole]:
        raise FileError(arguments.file, f"is damaged (the {' and '.join(wrong)})", "get it again, best in a zip archive")
    return 0


def _edit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FRIEND", help="a packed executable")
    parser.add_argument("-o", "--output", metavar="OUT", help="write another executable; default: replace FRIEND")
    _persona_arguments(parser)


def _edit(arguments: argparse.Namespace) -> int:
    from pocketlm.build.pack import set_persona, with_texts

    packed, texts, flags = _find(arguments.file), _texts(arguments), _flags(arguments)
    if flags or arguments.output or any(text is not None for text in texts.values()):
        persona = set_persona(packed, lambda old: with_texts(old, texts, flags), Path(arguments.output or arguments.file))
    else:
        persona = from_bytes(packed.read("persona"), packed.path)
    print(*persona.lines(), sep="\n")
    return 0


def _stub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="PATH", help="default: the cache folder, where pocketlm pack looks")
    _for_arguments(parser)


def _stub(arguments: argparse.Namespace) -> int:
    names = _platforms(arguments)
    for name in names:
        path = _stub_for(name, arguments)
        if arguments.output:
            path = _copy(path, Path(arguments.output if len(names) == 1 else f"{arguments.output}-{name}"))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _copy(path: Path, out: Path) -> Path:
    with replacing_file(out, path.stat().st_size) as part:
        shutil.copyfile(path, part)
        part.chmod(0o755)
    return out


COMMANDS = {
    "pack": Command(_pack_arguments, _pack),
    "unpack": Command(_unpack_arguments, _unpack),
    "persona": Command(_edit_arguments, _edit),
    "check": Command(_check_arguments, _check),
    "stub": Command(_stub_arguments, _stub),
}
