"""The `pocketlm` command: one row per subcommand. Parses, calls the package, prints.

Results go to stdout, notes and timings to stderr. Exit status 0: done, 1: the work failed, 2: wrong usage. Nothing heavy
is imported before a subcommand needs it, so that `pocketlm --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple, NoReturn

from pocketlm import __version__
from pocketlm.batch import command as batch
from pocketlm.cli_options import (
    DEFAULT_MODEL,
    answer_keywords,
    form_arguments,
    form_keywords,
    is_packed,
    model_arguments,
    open_model,
    read_text,
    sampling_arguments,
    sampling_keywords,
)
from pocketlm.errors import FileError, PocketlmError, UsageError, decimal, did_you_mean
from pocketlm.terminal_text import count, print

Arguments = argparse.Namespace
NAME = "pocketlm"
FLAGS_ELSEWHERE = {  # how other programs call a flag → what it is called here
    "--temperature": "--temp", "--max-new-tokens": "--max-tokens", "--n-predict": "--max-tokens", "--ctx-size": "--ctx",
    "--num-ctx": "--ctx", "--context": "--ctx", "--system-prompt": "--system", "--quantize": "--quant", "--outfile": "--output",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Its errors are one line: the usage in front of them has up to fourteen, and is what --help shows. A number
    may have a comma where others have a point: `--temp 0,5`."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("type", float, decimal)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists what there is")


class Command(NamedTuple):
    """A subcommand: its help text, a function that declares its arguments, and one that runs it and returns the exit status."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[Arguments], int]


def main(argv: list[str] | None = None, load: Callable[..., Any] | None = None, program: str = NAME) -> int:
    """Run one command line; returns the exit status. A user's error is printed as one line, without a traceback.

    `load` replaces `pocketlm.load`. `program`: the first word of errors; for a packed program, its name.
    """
    argv = sys.argv[1:] if argv is None else argv
    _settle_encoding(sys.stdout)  # before the first help text, too
    _mind_signals()
    try:
        arguments = _parse(argv, program)
        arguments.load, arguments.program = load, program
        status = arguments.run(arguments)
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
        return status
    except PocketlmError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        give_up_output()
        return 0
    except OSError as error:  # files are opened where their errors become FileErrors: this is a full disk, a lost terminal
        give_up_output()
        print(f"{program}: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except MemoryError:
        print(f"{program}: not enough memory; use a smaller model, a smaller --ctx, or close other programs", file=sys.stderr)
        return 1


def _parse(argv: list[str], program: str) -> Arguments:
    """The parsed command line.

    Before Python 3.12 argparse sets an optional MODEL or TEXT to its default as soon as it meets an option, and the word itself
    is left over. It is put in its place here.
    """
    parser = _parser(argv[:1], program)
    _check_words(argv)
    arguments, rest = parser.parse_known_args(argv)
    for name in ("model", "question", "text"):
        if rest and getattr(arguments, name, "") is None and not any(word.startswith("--") for word in rest):
            setattr(arguments, name, rest.pop(0))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _mind_signals() -> None:
    """Let SIGTERM end process 1 of a container, too: Linux delivers no signal to process 1 that has no handler."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _settle_encoding(stream: Any, system: str = os.name) -> None:
    """Write "?" for a character that a terminal cannot show. Use UTF-8 for pipes and files on Windows, whose own encoding
    lacks most of the world's letters, unless the user chose one in PYTHONIOENCODING."""
    if isinstance(stream, io.TextIOWrapper):
        lossy = system == "nt" and not stream.isatty() and "PYTHONIOENCODING" not in os.environ
        stream.reconfigure(errors="replace", encoding="utf-8" if lossy else None)


def _check_words(argv: list[str]) -> None:
    """Raises UsageError for an unknown command or flag, and suggests the one that is meant."""
    name, *words = argv or [""]
    if name not in COMMANDS and name and not name.startswith("-"):
        hint = f", did you mean pocketlm chat {name}?" if os.path.exists(name) else did_you_mean(name, COMMANDS)
        raise UsageError(f"{name}: there is no such command{hint or '; pocketlm --help lists them'}")
    if name in COMMANDS:
        flags = options(name)
        shown = [flag for flag, option in flags.items() if option.help != argparse.SUPPRESS]
        for word in takewhile("--".__ne__, words):
            flag = word.partition("=")[0]
            if flag.startswith("--") and " " not in flag and flag not in flags:
                hint = did_you_mean(flag, shown, cutoff=0.6, others=FLAGS_ELSEWHERE) or "; --help lists them"
                raise UsageError(f"{name} {flag}: there is no such flag{hint}")


def options(command: str) -> dict[str, argparse.Action]:
    """A command's options by their long flags."""
    parser = Parser()
    COMMANDS[command].arguments(parser)
    return {flag: option for flag, option in parser._option_string_actions.items() if flag.startswith("--")}


def give_up_output() -> None:
    """Send the rest of the output nowhere: else Python, on exit, flushes it once more and prints the error."""
    if sys.stdout is not None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _parser(chosen: list[str], program: str) -> Parser:
    """The parser; only the chosen command's arguments are declared, since declaring all takes longer than answering."""
    parser = Parser(prog=program, description="Small language models as one file, run in Python.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pocketlm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        if name in chosen:
            command.arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def _chat_arguments(parser: Parser) -> None:
    model_arguments(parser, optional=True)
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="answer this, and end")
    sampling_arguments(parser)
    form_arguments(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--title", metavar="TEXT", help="what the first line calls the model")
    parser.add_argument("--greeting", metavar="TEXT", help="what the chat says first")
    parser.add_argument("--template", metavar="NAME", help="chat template: chatml, markers, alpaca, plain or a Jinja file")
    parser.add_argument(
        "--think", choices=("on", "off", "hide"), metavar="on|off|hide", help="whether it thinks first; hide: does so unseen"
    )
    resumed = "go on with the last conversation with this model, or with the one of that name"
    parser.add_argument("--resume", nargs="?", const=True, default=False, metavar="NAME", help=resumed)
    parser.add_argument("--lines", action="store_true", help="every line of a pipe is a message or a slash command")
    parser.add_argument("--save", action="store_true", default=None, help="keep a record of a conversation through pipes, too")
    parser.add_argument("--no-save", dest="save", action="store_false", help="keep no record of the conversation")
    # of packed programs: whose conversations these are, and what the model is told before new ones
    parser.add_argument("--model-id", default="", help=argparse.SUPPRESS)
    parser.add_argument("--default-system", default="", help=argparse.SUPPRESS)
    parser.epilog = (
        "With QUESTION, or through a pipe, it answers once: the text of the pipe is one message, and follows the question. "
        "A pipe in which a line is a slash command is read line by line, as with --lines."
    )


def _is_model(name: str) -> bool:
    from pocketlm.model import find_model

    try:
        return not name.endswith(".json") and find_model(name).exists()
    except FileError:
        return False


def _chat(arguments: Arguments) -> int:
    from pocketlm.chat import repl

    if isinstance(arguments.resume, str) and arguments.model is None and _is_model(arguments.resume):
        arguments.model, arguments.resume = arguments.resume, True  # `chat --resume MODEL`
    if arguments.question is None and arguments.model and " " in arguments.model and not os.path.exists(arguments.model):
        advice = f'to ask the one that comes with pocketlm: chat {DEFAULT_MODEL} "…"'
        raise FileError(arguments.model, "there is no such model", advice)
    sampling = {**answer_keywords(arguments), **form_keywords(arguments)}
    with open_model(arguments) as model:
        watch: Callable[[], str] = str
        if not is_packed():  # a packed program has no doctor
            from pocketlm.doctor.health import Throttling

            watch = Throttling().note
        return repl.run(
            model, sampling=sampling, system=arguments.system, resume=arguments.resume, save=arguments.save,
            question=arguments.question, lines=arguments.lines, template=arguments.template, think=arguments.think,
            title=arguments.title, greeting=arguments.greeting, model_id=arguments.model_id, program=arguments.program,
            watch=watch, default_system=arguments.default_system,
        )  # fmt: skip


def _generate_arguments(parser: Parser) -> None:
    model_arguments(parser)
    piped = "the text to continue; without it, or with -, what comes through a pipe"
    parser.add_argument("-p", "--prompt", metavar="TEXT", help=piped)
    parser.add_argument("-f", "--file", metavar="FILE", help="the text to continue, from a file; - reads standard input")
    parser.add_argument("-n", "--max-tokens", type=int, default=128, metavar="N", help="at most this many tokens (default 128)")
    parser.add_argument("--json", action="store_true", help="one JSON object with text, ids and timings")
    sampling_arguments(parser)
    form_arguments(parser)
    batch.arguments(parser)


def _prompt(arguments: Arguments) -> str:
    """The text to continue: -p's; a file's, unchanged; or a pipe's, without its last line break, as in `$(…)`."""
    usage = "generate: give the text to continue with -p TEXT or -f FILE, or through a pipe"
    if arguments.prompt is not None and arguments.file is not None:
        raise UsageError(usage)
    if arguments.file is not None:
        return read_text(arguments.file)
    if arguments.prompt not in (None, "-"):
        return arguments.prompt
    if arguments.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(usage)
    text = read_text("-")
    if not text and arguments.prompt is None:
        raise UsageError(usage)
    return text.removesuffix("\n").removesuffix("\r")


def _generate(arguments: Arguments) -> int:
    if arguments.input or arguments.output or arguments.dask:
        return batch.run(arguments)
    prompt = _prompt(arguments)
    options = {**sampling_keywords(arguments), **form_keywords(arguments)}
    with open_model(arguments) as model:
        if lost := model.tokenizer.unknown(prompt):
            named = ", ".join(repr(c) for c in lost[:20]) + ", …" * (len(lost) > 20)
            print(f"{arguments.program}: the model knows no {named}: left out of the prompt", file=sys.stderr)
            prompt = model.tokenizer.encodable(prompt)
        text, ids, last = "", [], None
        for last in model.generate(prompt, max_tokens=arguments.max_tokens, **options):
            text += last.text
            ids += [last.id] if last.id >= 0 else []
            if not arguments.json:
                print(last.text, end="", flush=True)
        assert last is not None
        speed = last.tokens_per_second
        if arguments.json:
            result = {
                "text": text, "ids": ids, "finish_reason": last.finish_reason, "model": model.name, "backend": model.backend,
                "threads": model.n_threads, "prompt_tokens": last.prompt_tokens, "generated_tokens": last.generated_tokens,
                "prompt_seconds": last.prompt_seconds, "generation_seconds": last.generation_seconds,
                "tokens_per_second": speed, "drafted_tokens": last.drafted_tokens, "accepted_tokens": last.accepted_tokens,
            }  # fmt: skip
            print(json.dumps(result, ensure_ascii=False))
        else:
            print()
            tokens, note = count(last.generated_tokens, "token"), f"; {last.note}" if last.note else ""
            print(f"[{tokens}, {speed:.1f} tokens/s, {last.finish_reason}{note}]", file=sys.stderr)
    return 0


def _tokenize_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL",
        help="a GGUF, a packed executable, a tokenizer.json, a SentencePiece .model, tiktoken ranks or a folder",
    )  # fmt: skip
    parser.add_argument("text", nargs="?", metavar="TEXT", help="default: standard input; with --decode, ids")
    parser.add_argument("--decode", action="store_true", help="ids to text")
    parser.add_argument("--special", action="store_true", help="markers such as <|im_end|> are tokens, not text")
    parser.add_argument("--bos", action="store_true", help="put the begin-of-text token in front")


def _tokenize(arguments: Arguments) -> int:
    from pocketlm import tokenizer
    from pocketlm.model import find_model

    tok = tokenizer.load(find_model(arguments.model))
    text = arguments.text if arguments.text is not None else read_text("-")
    if not arguments.decode:
        print(*tok.encode(text, special=arguments.special, bos=arguments.bos))
        return 0
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"tokenize --decode: {str(error).split(': ')[-1]} is not an id; give whole numbers") from None
    print(tok.decode(ids, special=arguments.special))
    return 0


def _inspect_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="a model file, a checkpoint, or the short name of an installed model")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _inspect(arguments: Arguments) -> int:
    from pocketlm.doctor.portrait import portrait
    from pocketlm.export.dialects import inspect_checkpoint
    from pocketlm.export.from_model_file import is_model_file
    from pocketlm.model import find_model
    from pocketlm.runtime.model_summary import describe, inspect

    path = find_model(arguments.file)
    is_checkpoint = path.exists() and not is_model_file(path)
    facts = (inspect_checkpoint if is_checkpoint else inspect)(path, tensors=arguments.tensors or arguments.json)
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(describe(facts))
    if not is_checkpoint and facts["parameters"]:
        print("", *portrait(path), sep="\n")
    return 0


def _folder(text: str, module: str, row: str = "") -> Command:
    """A command whose arguments and work are a module's, imported on first use; `row`: which of its COMMANDS, where it has
    several.
    """

    def command() -> Any:
        found = importlib.import_module(module)
        return found.COMMANDS[row] if row else found

    return Command(text, lambda parser: command().arguments(parser), lambda arguments: command().run(arguments))


COMMANDS: dict[str, Command] = {
    "chat": Command("Talk to a model.", _chat_arguments, _chat),
    "chats": _folder("List, delete or export saved conversations.", "pocketlm.chat.command"),
    "serve": _folder("Answer programs and a page in the browser.", "pocketlm.serve.command"),
    "generate": Command("Complete a text.", _generate_arguments, _generate),
    "export": _folder(
        "Turn a checkpoint into a GGUF, fp16 bin, ONNX, Ollama or Hugging Face model.", "pocketlm.export.command"
    ),
    "pack": _folder("Make one executable out of a model.", "pocketlm.build.command", "pack"),
    "unpack": _folder("Take the GGUF out of a packed executable.", "pocketlm.build.command", "unpack"),
    "persona": _folder("Change what a packed executable says about itself.", "pocketlm.build.command", "persona"),
    "check": _folder(
        "Say whether a packed executable or a model file is whole, and which part is not.", "pocketlm.build.command", "check"
    ),
    "stub": _folder("Build the executable that models are packed into.", "pocketlm.build.command", "stub"),
    "tokenize": Command("Show a text's token ids, or the text of ids.", _tokenize_arguments, _tokenize),
    "inspect": Command("Show what is in a model file or a checkpoint.", _inspect_arguments, _inspect),
    "bench": _folder("Run a model through every backend of this machine, side by side.", "pocketlm.bench.command"),
    "doctor": _folder("Say what this machine can run, how fast at most, and what to change.", "pocketlm.doctor.command"),
    "pull": _folder("Fetch a good small model by its name.", "pocketlm.pull.command"),
    "eval": _folder("Measure how well models predict texts.", "pocketlm.bench.evaluate"),
    "train": _folder("Train a small model from texts.", "pocketlm.train.command"),
}
