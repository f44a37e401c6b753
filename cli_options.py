"""What several commands share: the options that name a model and texts, what is opened by them, and the options by which the
next token is chosen. Knows no command.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, UsageError, refused, whole_number
from pocketlm.terminal_text import print

DEFAULT_MODEL = "small-talk"  # the short name of the model that comes with the package
SAMPLING = {  # flag -> (keyword of SamplingOptions, type, help)
    "--temp": ("temperature", float, "0 always takes the likeliest token; higher is more varied"),
    "--top-k": ("top_k", int, "only the N likeliest tokens; 0: all"),
    "--top-p": ("top_p", float, "the fewest likeliest tokens that together have this probability; 1: all"),
    "--min-p": ("min_p", float, "only tokens with this share of the likeliest one's probability; 0: all"),
    "--repeat-penalty": ("repeat_penalty", float, "makes recent tokens less likely; 1: off"),
    "--presence-penalty": ("presence_penalty", float, "taken from the logit of every recent token"),
    "--frequency-penalty": ("frequency_penalty", float, "the same, once for every time it occurred"),
    "--seed": ("seed", int, "the same seed gives the same text"),
}


def is_packed() -> bool:
    """Whether this is a packed program, which has only a part of pocketlm."""
    return getattr(sys, "frozen", False)


def model_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    text = "a GGUF file, or the short name of an installed or fetched model (small-talk, smollm2, qwen3-0.6b)"
    if optional:
        text += "; default: small-talk, which comes with pocketlm"
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=text)
    running_arguments(parser)


def running_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of how a model is run."""
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto (default), native or numpy")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the number of physical cores")
    parser.add_argument(
        "--ctx", type=int, metavar="N", help="tokens the model can look back on (default: its own, at most 4096)"
    )
    parser.add_argument("--nice", action="store_true", help="let other programs go first")
    parser.add_argument("--low-memory", action="store_true", help="take little memory: --ctx is 1024 unless given")
    cache_argument(parser)


def cache_argument(parser: Any) -> None:
    text = "what the model looks back on is kept as q16 (default) or q8, in half the memory"
    parser.add_argument("--kv", metavar="KIND", help=text)


def running_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `running_arguments` as keywords of `pocketlm.load`."""
    return {"backend": arguments.backend, "threads": arguments.threads, "ctx": arguments.ctx, "kv": arguments.kv or "q16"}


def open_model(arguments: argparse.Namespace) -> Any:
    """Open the model that the options name, with `arguments.load` if that is set. Prints a note if `--ctx` is longer than what
    the model was trained for. Raises FileError for a model without a tokenizer: every command that uses this needs texts.
    """
    if arguments.nice:
        from pocketlm.runtime.processors import be_nice

        be_nice()
    if arguments.low_memory:
        from pocketlm.runtime.memory import be_sparing

        be_sparing()
    name = DEFAULT_MODEL if arguments.model is None else arguments.model
    if arguments.load is not None:
        return arguments.load(name, **running_keywords(arguments))
    import pocketlm

    model = pocketlm.load(name, **running_keywords(arguments))
    try:
        _ = model.tokenizer  # raises FileError where the file has none
        if not model.hyper.reaches(model.n_ctx):
            beyond = f"{model.name} was trained for {model.hyper.n_ctx} tokens and may lose its way beyond"
            print(f"{arguments.program}: --ctx {model.n_ctx}: {beyond}", file=sys.stderr)
    except BaseException:
        model.close()
        raise
    return model


def read_text(path: str) -> str:
    """The UTF-8 text of a file, or of standard input for `-`, without the mark that editors of Windows put in front. Raises
    FileError.
    """
    with refused(path, "check the path"):
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode().removeprefix("\ufeff")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to choose the next token")
    for flag, (_, kind, text) in SAMPLING.items():
        group.add_argument(flag, type=kind, metavar="X" if kind is float else "N", help=text)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    group.add_argument(
        "--draft", default="on", metavar="on|off", choices=("on", "off"),
        help="on (default): tokens that the text so far foretells are verified together; the answer is the same",
    )  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end token")


def form_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the answer must look like")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE", help="the answer is JSON, valid under the schema in this file")
    forms.add_argument("--json-object", action="store_true", help="the answer is a JSON object")
    forms.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these texts; give it for each")
    matched = "the answer is what the regular expression matches from beginning to end"
    forms.add_argument("--regex", metavar="PATTERN", help=matched)


def form_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """The form of the answer, if one was asked for. Raises FileError or UsageError now, before a model is opened in vain."""
    given = {"json_object": arguments.json_object or None, "choices": arguments.choice, "regex": arguments.regex}
    given = {keyword: value for keyword, value in given.items() if value is not None}
    if arguments.json_schema is not None:
        try:
            given["json_schema"] = json.loads(read_text(arguments.json_schema))
        except (ValueError, RecursionError) as error:
            raise FileError(arguments.json_schema, f"it is no JSON ({error})", "give a file with a JSON schema") from None
    if given:
        from pocketlm.constrain.guides import check_form

        try:
            check_form(given)
        except UsageError as error:
            if arguments.json_schema is None:
                raise
            raise FileError(arguments.json_schema, str(error)) from None
    return given


def sampling_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sampling keywords that were given; the others keep their defaults. Raises UsageError for a value out of range."""
    given = {keyword: getattr(arguments, flag[2:].replace("-", "_")) for flag, (keyword, _, _) in SAMPLING.items()}
    given = {keyword: value for keyword, value in given.items() if value is not None}
    if given:  # before a model is opened for nothing
        from pocketlm.runtime.sampling_options import SamplingOptions

        SamplingOptions(**given)
    return {**given, "stop": tuple(arguments.stop), "ignore_eos": arguments.ignore_eos, "draft": arguments.draft == "on"}


def answer_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sampling keywords of a chat or a server, with `max_tokens` (at least 1) only if it was given."""
    given = sampling_keywords(arguments)
    if arguments.max_tokens is not None:
        from pocketlm.runtime.sampling_options import MAX_TOKENS

        given["max_tokens"] = whole_number("--max-tokens", arguments.max_tokens, 1, MAX_TOKENS)
    return given
