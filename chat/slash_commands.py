"""The slash commands: one table, a row each.

In: a line that starts with a slash, and the `Chat` it is for. Out: what the command does to that chat, and notes on its
console. Values for the sampler are checked by `SamplingOptions`, so the ranges are those of the command line.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.chat import saved, transcript
from pocketlm.chat.dialogue import Chat
from pocketlm.errors import FileError, PocketlmError, UsageError, decimal, did_you_mean

THINK = ("on", "off", "hide")
LISTED = 10  # conversations that /load shows


@dataclass(frozen=True)
class Command:
    """`argument`: how it is shown in the help. `run` gets the chat and the text after the name."""

    argument: str
    help: str
    run: Callable[[Chat, str], object]
    words: Callable[[], Iterable[str]] = tuple  # completions of the argument


def is_command(line: str) -> bool:
    """Whether a line is one of the commands of the table, or one that was mistyped."""
    name = _parts(line)[0].lower()
    return line.startswith("/") and name.isidentifier() and (name in COMMANDS or bool(did_you_mean(name, COMMANDS, cutoff=0.7)))


def _parts(line: str) -> tuple[str, str]:
    """The name, and what stands behind it, maybe on lines of its own."""
    name, *rest = re.split(r"\s", line[1:], maxsplit=1)
    return name, "".join(rest)


def run(chat: Chat, line: str) -> None:
    """Carry out one line such as `/temp 0.5`. Raises PocketlmError or UsageError, one line for the user."""
    name, argument = _parts(line)
    command = COMMANDS.get(name.lower())
    if command is None:
        near = did_you_mean(name, COMMANDS, "/")
        raise UsageError(f"/{name[:40]} is no command{near}; /help lists them, //… sends a line with a slash")
    if argument.strip() and not command.argument:
        raise UsageError(f"/{name} {argument.strip()[:40]}: nothing can stand behind /{name}")
    try:
        command.run(chat, argument.strip())
    except UsageError as error:
        said = str(error).removeprefix("--")  # as a flag of the command line
        near = did_you_mean(argument.strip(), command.words())
        raise UsageError(f"{said}{'' if near in said else near}") from None


def complete(line: str) -> list[str]:
    """The command names, or the argument's values, that an unfinished line can go on with."""
    name, space, argument = line.partition(" ")
    if not line.startswith("/") or "\n" in line:
        return []
    if not space:
        return [f"/{other}" for other in COMMANDS if f"/{other}".startswith(name)]
    command = COMMANDS.get(name[1:])
    return [word for word in command.words() if word.startswith(argument)] if command else []


# ---- what they do ------------------------------------------------------------------------------------------------------


def _help(chat: Chat, _: str) -> None:
    width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items())
    rows = [f"/{f'{name} {command.argument}':{width}}  {command.help}" for name, command in COMMANDS.items()]
    chat.console.note("\n".join(rows), style="", indent=width + 3)
    keys = "A line that ends in \\ goes on in the next one, as does Alt-Enter. Ctrl-C stops an answer, Ctrl-D leaves."
    chat.console.note(keys, style="")


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.conversation.system = "" if text == "off" else text
        chat.save()
    chat.console.note(f"system: {chat.conversation.system or '(none)'}")


def _sampled(keyword: str, kind: type, empty: Any = ...) -> Callable[[Chat, str], None]:
    """A command that shows or sets one sampling option. `off` sets it to `empty`, if that is given."""

    def command(chat: Chat, text: str) -> None:
        from pocketlm.runtime.sampling_options import SamplingOptions

        if text:
            value = empty if text == "off" and empty is not ... else _number(text, kind)
            SamplingOptions(**{keyword: value})
            chat.sampling[keyword] = value
        default = getattr(SamplingOptions(**chat.model.chat_defaults), keyword)
        chat.console.note(f"{keyword}: {chat.sampling.get(keyword, default)}")

    return command


def _max_tokens(chat: Chat, text: str) -> None:
    from pocketlm.runtime.sampling_options import MAX_TOKENS

    if text:
        value = _number(text, int)
        if not 1 <= value <= MAX_TOKENS:
            raise UsageError(f"max_tokens is {value}; it must be from 1 to {MAX_TOKENS}")
        chat.sampling["max_tokens"] = value
    chat.console.note(f"max_tokens: {chat.sampling['max_tokens']}")


def _number(text: str, kind: type) -> Any:
    try:
        return decimal(text) if kind is float else kind(text)
    except ValueError:
        raise UsageError(f"{text[:40]!r} is no {'whole number' if kind is int else 'number'}") from None


def _stop(chat: Chat, text: str) -> None:
    stops = tuple(chat.sampling.get("stop", ()))
    if text:
        new = text.replace("\\n", "\n").replace("\\t", "\t")
        chat.sampling["stop"] = stops = () if text == "off" else (*stops, new)
    chat.console.note(f"stop: {', '.join(map(repr, stops)) or '(only where the model ends its turn)'}")


def _stats(chat: Chat, text: str) -> None:
    if text in ("on", "off"):
        chat.show_stats = text == "on"
    elif text:
        raise UsageError(f"/stats {text[:40]}: expected on, off or nothing")
    else:
        chat.console.note("\n".join(chat.statistics()), style="")


def _think(chat: Chat, text: str) -> None:
    if text:
        if text not in THINK:
            raise UsageError(f"/think {text[:40]}: expected {', '.join(THINK[:-1])} or {THINK[-1]}")
        chat.think(text)
    chat.console.note(f"thinking: {chat.thoughts()}")


def _save(chat: Chat, name: str) -> None:
    if not chat.conversation.messages:
        raise PocketlmError("there is nothing to save yet")
    path = Path(os.path.abspath(saved.as_path(name))) if name else chat.record.path
    if path is None or path == chat.record.path:
        record = chat.record
    elif path in chat.copies:
        record = chat.copies[path]
    elif os.path.lexists(path):
        transcript.load(path)  # raises where it is another kind of file
        raise FileError(path, "holds another conversation", "choose another name")
    else:
        record = transcript.Record(path)
    chat.conversation.model_id = chat.model_id
    record.save(chat.conversation)
    if path is not None and record is not chat.record:
        chat.copies[path] = record
    chat.console.note(f"saved: {record.path}")


def _saved_names() -> list[str]:
    try:
        return [path.stem for path in saved.paths()]
    except PocketlmError:
        return []


def _load(chat: Chat, name: str) -> None:
    if name:
        chat.resume(saved.find(name))
        return
    known = saved.paths()
    rest = [f"… and {len(known) - LISTED} more, by the beginning of their name"] * (len(known) > LISTED)
    how = "/load NUMBER, or NAME, or how that begins:" if known else "there are no saved conversations yet"
    chat.console.note("\n".join([how, *saved.listed(known[:LISTED]), *rest]), style="", indent=4)


def _threads(chat: Chat, text: str) -> None:
    if text:
        chat.model.set_threads(_number(text, int))
    chat.console.note(f"threads: {chat.model.n_threads}")


def _backend(chat: Chat, text: str) -> None:
    if text:
        chat.model.set_backend(text)
    chat.console.note(f"backend: {chat.model.backend}")


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", _help),
    "quit": Command("", "leave, as Ctrl-D does", lambda chat, _: chat.leave()),
    "reset": Command("", "begin a new conversation; the system prompt stays", lambda chat, _: chat.reset()),
    "system": Command("[TEXT|off]", "what the model is told before the conversation", _system, lambda: ("off",)),
    "temp": Command("[X]", "temperature; 0 always takes the likeliest token", _sampled("temperature", float)),
    "top_k": Command("[N]", "only the N likeliest tokens; 0: all", _sampled("top_k", int)),
    "top_p": Command("[X]", "only the likeliest that make up this probability; 1: all", _sampled("top_p", float)),
    "min_p": Command("[X]", "only those with this share of the likeliest one's probability; 0: all", _sampled("min_p", float)),
    "repeat_penalty": Command("[X]", "makes recent tokens less likely; 1: off", _sampled("repeat_penalty", float)),
    "max_tokens": Command("[N]", "the longest answer", _max_tokens),
    "seed": Command("[N|off]", "the same seed gives the same answer", _sampled("seed", int, None), lambda: ("off",)),
    "stop": Command("[TEXT|off]", "one more text that ends an answer (\\n for a new line); off: none", _stop, lambda: ("off",)),
    "think": Command("[on|off|hide]", "whether it thinks before it answers; hide: unseen", _think, lambda: THINK),
    "stats": Command("[on|off]", "figures of the last answer; on, off: a line after each", _stats, lambda: ("on", "off")),
    "undo": Command("", "take back the last question and its answer", lambda chat, _: chat.undo()),
    "retry": Command("", "ask the last question again", lambda chat, _: chat.retry()),
    "more": Command("", "go on with an answer that was cut off or stopped", lambda chat, _: chat.more()),
    "save": Command("[FILE]", "save the conversation", _save),
    "load": Command("[NUMBER|NAME|FILE]", "go on with a saved conversation; alone: a list", _load, _saved_names),
    "threads": Command("[N]", "on how many threads the model runs", _threads),
    "backend": Command("[NAME]", "auto, native or numpy", _backend, lambda: ("auto", "native", "numpy")),
}
