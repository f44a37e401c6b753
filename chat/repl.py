"""A chat from its first line to its last: where messages come from, and who handles them.

In: a model (anything with the attributes of `pocketlm.model.Model`, or one that is being opened) and what the command line
asked for. Out: the conversation at a terminal or through pipes, its file, an exit status. Knows no weights and no files of
models.
"""

from collections.abc import Callable
from typing import Any, TextIO

from pocketlm.chat import saved, slash_commands, transcript
from pocketlm.chat.console import BOLD, Console, OutputClosed
from pocketlm.chat.dialogue import Chat
from pocketlm.chat.endings import Terminated
from pocketlm.chat.opening import Opening, OpeningFailed
from pocketlm.errors import PocketlmError
from pocketlm.terminal_text import count


def run(
    model: Any,
    *,
    sampling: dict[str, Any],
    system: str | None = None,
    default_system: str = "",
    resume: bool | str = False,
    save: bool | None = None,
    question: str | None = None,
    lines: bool = False,
    template: str | None = None,
    think: str | None = None,
    title: str | None = None,
    greeting: str | None = None,
    model_id: str = "",
    program: str = "pocketlm",
    watch: Callable[[], str] = lambda: "",
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Hold a conversation until its end; returns the exit status: 1 if a message from a pipe could not be answered.

    With a `question`, the chat answers it, followed by the text of a pipe if there is one, and ends. Without one, the text of
    a pipe is a single message; with `lines`, or if a line of it is a slash command, every line is a message.

    `sampling`: keywords of `model.chat`. `system`: the system prompt; `default_system`: that of new conversations only.
    `resume`: True goes on with the last conversation that a person held with this model, a text with the one of that name.
    `save`: None saves conversations at a terminal only; with False not even the input history is kept. `template`: a built-in
    name or a Jinja file, in place of the model's own. `think`: "on", "off" or "hide", as for /think. `title` replaces name and
    figures in the banner; `greeting` is printed below it. `model_id` identifies the model's conversations, in place of its
    fingerprint; `program`: the first word of errors. `watch` is called after every answer at a terminal, and what it returns is
    noted if it is not "". Raises PocketlmError for anything wrong before the first message.
    """
    console = Console(stdin, stdout, stderr, one_shot=question is not None)
    keeping = console.interactive if save is None else save
    folder = transcript.data_folder() if keeping else None
    console.use(slash_commands.complete, folder / "history" if folder else None)
    chat = Chat(model, console, sampling, keeping, model_id, program)
    try:
        with chat.endings:
            if template is not None:
                from pocketlm.chat.templates import named

                chat.model.template = named(template, chat.model.tokenizer)
            if console.interactive:
                chat.watch = watch
            if think is not None:
                chat.think(think)
            if console.interactive:
                _banner(chat, title, greeting)
            chat.conversation.system = default_system
            if resume:
                advice = saved.IN_A_SHELL if program == "pocketlm" else saved.IN_A_CHAT
                chat.resume(saved.find(resume, advice) if isinstance(resume, str) else None)
            if system is not None:
                chat.conversation.system = system.encode("utf-8", "replace").decode()  # an argument can hold lone surrogates
            if isinstance(model, Opening):
                console.when_asked(lambda: model.start(chat.conversation.for_model(), console.end, chat.restore))
            status = _converse(chat, question, lines)
            with chat.endings.held():
                chat.keep_state()
            return status
    except OpeningFailed as failed:
        raise failed.error from None
    except OutputClosed as closed:
        console.give_up_output()
        if closed.reason and not chat.endings.ended:
            raise PocketlmError(f"the answer cannot be written: {closed.reason}") from None
        return chat.endings.ended.status if chat.endings.ended else 0
    except Terminated as ended:
        console.give_up_output()
        return ended.status


def _converse(chat: Chat, question: str | None, lines: bool) -> int:
    """Answer everything that comes; returns the exit status."""
    console = chat.console
    if question is not None:
        text = console.read_all(lambda line: False) if console.piped else ""
        _handled(chat, "\n".join(filter(None, (question.encode("utf-8", "replace").decode(), text))), as_text=True)
    elif console.piped and not lines and (text := console.read_all(slash_commands.is_command)) is not None:
        _handled(chat, text, as_text=True)
    else:
        _loop(chat)
    return int(chat.failed and not console.interactive)


def _loop(chat: Chat) -> None:
    """Read and answer until the end of the input."""
    interrupted = False
    while not chat.leaving:
        try:
            line = chat.console.read()
            interrupted = False
            _handled(chat, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not chat.console.interactive:
                raise
            if interrupted:
                chat.console.note("Ctrl-D leaves")
            interrupted = True


def _handled(chat: Chat, message: str, as_text: bool = False) -> None:
    """Carry out a command or answer a message (`as_text`: a slash at its beginning means nothing); errors become notes."""
    try:
        if message.startswith("/") and not message.startswith("//") and not as_text:
            slash_commands.run(chat, message)
        elif message.strip():
            chat.ask(message[1:] if message.startswith("//") and not as_text else message)
    except PocketlmError as error:
        chat.failed = True
        chat.console.note(f"{chat.program}: {error}", style="")


def _banner(chat: Chat, title: str | None, greeting: str | None) -> None:
    chat.console.note(title or chat.model.name, style=BOLD)
    if not title:
        model = chat.model
        facts = (
            f"{_short(model.n_parameters)} parameters",
            f"{_short(model.file_bytes)}B",
            model.backend,
            count(model.n_threads, "thread"),
            f"context {model.n_ctx}",
        )
        chat.console.note(" · ".join(facts))
    chat.console.note("/help lists the commands · Ctrl-C stops an answer · Ctrl-D leaves")
    if greeting:
        chat.console.note(greeting, style="")


def _short(n: int) -> str:
    """135 million → "135 M", for counts and for bytes."""
    power = min((len(str(n)) - 1) // 3, 3)
    return f"{n / 1000**power:.3g} {('', 'k', 'M', 'G')[power]}"
