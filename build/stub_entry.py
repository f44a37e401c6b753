"""What a friend's executable does: a conversation; `generate`, --help, --check and --selftest for the curious.

In: the command line, the executable itself. Out: an exit status. The work is the `pocketlm` command's, with the packed
model in place of MODEL and the persona's options in front of the user's.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pocketlm
from pocketlm import __version__, cli
from pocketlm.build import persona, terminal
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.runtime import container
from pocketlm.runtime.container import Packed
from pocketlm.terminal_text import print

if TYPE_CHECKING:
    from pocketlm.chat.opening import Opening

_openings: list[Opening] = []  # models that are opened while the user does something else
HOW_TO = "Write something and press Enter. To leave: /quit"
_HELP = """\
A conversation with a language model. Everything happens on this computer: no network is used.

  {name}                        talk
  {name} "QUESTION"             answer once; the text of a pipe is one message, and follows the question
  {name} --web                  talk in the browser; --port N, --no-browser, --api-key KEY
  {name} generate -p TEXT       continue a text (-n N: at most N tokens, --json: with ids and timings)
  {name} --model FILE.gguf      talk to another model; also with generate
  {name} --check                has the file arrived whole?
  {name} --selftest             does this processor compute what it should?
  {name} --licences             of all that is in this file
  {name} --version

Options of a conversation and of generate:
{both}

Of a conversation alone:
{chat}

Of generate alone:
{generate}
"""


def main() -> None:
    """Run, and end the process. After an error, a console that only this program uses is kept open."""
    gc.set_threshold(50_000)  # at the start much is made and little becomes garbage: a fifth of the time
    terminal.forget_loader()
    _hold_program()
    arguments = sys.argv[1:]
    if not arguments and terminal.open_one(sys.executable, arguments):
        sys.exit(0)
    try:
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except PocketlmError as error:
        print(f"{Path(sys.executable).name}: {error}", file=sys.stderr)
        status = error.exit_status
    except SystemExit as end:  # argparse
        status = end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        cli.give_up_output()
        status = 0
    except Exception as error:  # the window shall not take its description away
        status = 1
        if (damage := _damage()) is not None:
            print(f"{Path(sys.executable).name}: {damage}", file=sys.stderr)
        elif isinstance(error, OSError):  # a full disk, a lost terminal
            cli.give_up_output()
            print(f"{Path(sys.executable).name}: {error}", file=sys.stderr)
        else:  # a defect
            import traceback

            traceback.print_exc()
    if 0 < status < 128 and terminal.is_own():  # from 128 on somebody has ended it
        terminal.wait_for_key()
    if any(opening.is_busy for opening in _openings):  # Python's own end would take away what that thread is using
        os._exit(status)
    sys.exit(status)


class _Held:
    """The program's file, as PyInstaller opens it for each module that is imported."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def seek(self, at: int) -> None:
        self._at = at

    def read(self, length: int) -> bytes:
        return self._data[self._at : self._at + length]


def _hold_program() -> None:
    """What is imported later comes from this very file, though another may have its name by then, or none."""
    if loader := sys.modules.get("pyimod01_archive"):
        with open(sys.executable, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        loader.open = lambda *_: _Held(data)  # pyright: ignore[reportAttributeAccessIssue]


def _damage() -> PocketlmError | None:
    """The error of a full check of the executable; None if it is whole. A file damaged on its way can fail anywhere."""
    try:
        if (packed := container.find(Path(sys.executable))) is not None:
            packed.check()
    except PocketlmError as error:
        return error
    return None


def _run(arguments: list[str]) -> int:
    executable = Path(sys.executable)
    if {"-h", "--help"} & set(arguments):
        print(_help(executable.name))
        return 0
    if "--version" in arguments:
        print(f"{executable.name}, made with pocketlm {__version__}")
        return 0
    if {"--licences", "--licenses"} & set(arguments):
        print((Path(__file__).parents[2] / "licences.txt").read_text(encoding="utf-8"))
        return 0
    try:
        import numpy  # noqa: F401
    except (ImportError, RuntimeError) as error:  # with a page of advice for programmers
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        old = PocketlmError(f"this computer's processor or system is too old for this program ({reason})")
        raise _damage() or old from None
    from pocketlm.runtime.native import aot, kernels

    kernels.use_images(str(Path(__file__).parents[2] / aot.KERNELS), __version__)
    model, arguments = _take_model(arguments)
    packed = container.find(executable)
    if packed is None and model is None:
        advice = "get it again, or name a model with --model FILE.gguf"
        raise FileError(executable, "holds no model, or was damaged on its way", advice)
    if alone := {"--check", "--selftest"} & set(arguments):
        if arguments[1:]:
            raise UsageError(f"{min(alone)} stands alone")
        if packed is None:
            raise FileError(executable, "holds no model", "pack one with pocketlm pack")
        return _check(packed) if arguments == ["--check"] else _selftest(packed)
    own = persona.from_bytes(packed.read("persona"), executable) if packed and model is None else persona.Persona()
    command = "serve" if own.ui == "web" and _are_of_page(arguments) else "chat"
    if "--web" in arguments:
        arguments, command = [word for word in arguments if word != "--web"], "serve"
    elif arguments[:1] in (["chat"], ["generate"]):
        command = arguments.pop(0)
    words = [command, model or str(executable), *own.arguments()]
    load = None
    if command != "generate":
        terminal.name_window(own.title)
    if command == "serve":
        words += ["--port=0", "--slots=4", "--browser"]
    if command in ("chat", "serve"):
        system = "--default-system" if command == "chat" else "--system"  # the page has conversations of its own
        words += [f"--title={own.title}"] * bool(own.title) + [f"{system}={own.system}"] * bool(own.system)
        words += [f"--greeting={own.greeting or HOW_TO if command == 'chat' else own.greeting}"]
        if packed and model is None:  # its conversations are this program's: this model under this title
            words += [f"--model-id={packed.sections['gguf'].sha256.hex()[:32]} {own.title}"]
        if own.title and command == "chat":
            load = partial(_open_later, own.title)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as QUIET has left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main(words + arguments, load, executable.name)


def _open_later(title: str, *arguments: Any, **options: Any) -> Opening:
    """An Opening of the model, which opens while the user reads the first lines."""
    from pocketlm.chat.opening import Opening

    _openings.append(Opening(partial(pocketlm.load, *arguments, **options), title))
    return _openings[-1]


def _take_model(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --model, and the other words."""
    for i, word in enumerate(arguments):
        if word == "--model":
            if i + 1 == len(arguments):
                raise UsageError("--model: expected a file, as in --model FILE.gguf")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if word.startswith("--model="):
            return word.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _are_of_page(arguments: list[str]) -> bool:
    """Whether these are nothing but options that the page takes: not a question, nor what a conversation alone can be told."""
    options, words = cli.options("serve"), iter(arguments)
    for word in words:
        flag, value, _ = word.partition("=")
        if flag not in options:
            return False
        if not value and options[flag].nargs != 0:
            next(words, None)
    return True


def _help(name: str) -> str:
    chat, generate = cli.options("chat"), cli.options("generate")
    parts = {"both": chat.keys() & generate, "chat": chat.keys() - generate, "generate": generate.keys() - chat}
    texts = {part: _option_lines({**generate, **chat}, flags - {"--help"}) for part, flags in parts.items()}
    return _HELP.format(name=name, **texts)


def _option_lines(options: dict[str, Any], flags: Set[str]) -> str:
    """A line for each of the options that have a help text, in their own order."""
    rows = []
    for option in (option for flag, option in options.items() if flag in flags and option.help != SUPPRESS):
        value = f"[{option.metavar}]" if option.nargs == "?" else option.metavar
        rows.append((", ".join(option.option_strings) + f" {value}" * bool(value), option.help))
    return "\n".join(f"  {words:<23} {text}" for words, text in rows)


def _check(packed: Packed) -> int:
    packed.check()
    print(f"{packed.path.name}: whole, {packed.path.stat().st_size:,} bytes")
    return 0


def _selftest(packed: Packed) -> int:
    """Print a line for everything that is tested, and the verdict. Exit status 1 if a result differs from the reference."""
    from pocketlm.build import selftest
    from pocketlm.runtime.model_file import open_packed

    data = packed.read("reference")
    if not data:
        raise FileError(packed.path, "was packed without reference results", "pack it again")
    with open_packed(packed) as file:
        results = list(selftest.results(json.loads(data), file, packed.path))
    for result in results:
        print(f"{result.name:<12} {result.text}")
    right, wrong = ([result.name for result in results if result.right is verdict] for verdict in (True, False))
    print(f"WRONG: {', '.join(wrong)}" if wrong else f"right: {', '.join(right)}")
    return int(bool(wrong))
