"""The loop of a chat: read a message, stream the answer, keep the conversation.

In: a model (anything with the attributes of `pocketlm.model.Model`, or one that is being opened) and what the command line
asked for. Out: the conversation at a terminal or through pipes, its file, an exit status. Knows no weights and no files of
models.
"""

from pathlib import Path
from typing import Any, TextIO

from pocketlm.chat import commands, transcript
from pocketlm.chat.console import BOLD, Console, OutputClosed
from pocketlm.chat.opening import Opening, OpeningFailed
from pocketlm.chat.transcript import Conversation
from pocketlm.errors import PocketlmError

ANSWER_TOKENS = 1024  # the longest answer unless asked for another: a small model may never find its end


def run(
    model: Any,
    *,
    sampling: dict[str, Any],
    system: str | None,
    resume: bool | str,
    save: bool,
    template: str | None = None,
    title: str | None = None,
    greeting: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Hold a conversation until its end; returns the exit status: 1 if a message from a pipe could not be answered.

    `sampling`: keywords of `model.chat`. `resume`: go on with the last conversation, or with the one of that name.
    `save` False keeps no conversation and no input history. `template`: a built-in name or a Jinja file in place of the
    model's own. `title`: what the banner shows in place of name and figures; `greeting`: what it says. Raises PocketlmError
    for what is wrong before the first message.
    """
    console = Console(stdin, stdout, stderr)
    chat = Chat(model, console, sampling, save)
    try:
        if template is not None:
            from pocketlm.chat.templates import named

            chat.model.template = named(template, chat.model.tokenizer)
        if console.interactive:
            _banner(chat, title, greeting)
        if resume:
            chat.resume(transcript.locate(resume) if isinstance(resume, str) else None)
        if system is not None:
            chat.conversation.system = system.encode("utf-8", "replace").decode()  # an argument can hold lone surrogates
        if isinstance(model, Opening):
            console.when_asked(lambda: model.start(chat.conversation.for_model(), console.end))
        return chat.loop()
    except OpeningFailed as failed:
        raise failed.error from None
    except OutputClosed as closed:
        console.give_up_output()
        if closed.reason:
            raise PocketlmError(f"the answer cannot be written: {closed.reason}") from None
        return 0


def _banner(chat: "Chat", title: str | None, greeting: str | None) -> None:
    chat.console.note(title or chat.model.name, style=BOLD)
    if not title:
        model = chat.model
        facts = (
            f"{_short(model.n_parameters)} parameters",
            f"{_short(model.file_bytes)}B",
            model.backend,
            _count(model.n_threads, "thread"),
            f"context {model.n_ctx}",
        )
        chat.console.note(" · ".join(facts))
    chat.console.note("/help lists the commands · Ctrl-C stops an answer · Ctrl-D leaves")
    if greeting:
        chat.console.note(greeting, style="")


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' * (n != 1)}"


def _short(n: int) -> str:
    """135 million → "135 M", for counts and for bytes."""
    power = min((len(str(n)) - 1) // 3, 3)
    return f"{n / 1000**power:.3g} {('', 'k', 'M', 'G')[power]}"


class Chat:
    """One conversation in progress: the model, what was said, how answers are sampled, where it is kept."""

    def __init__(self, model: Any, console: Console, sampling: dict[str, Any], save: bool):
        self._model, self.console = model, console
        self.sampling = {"max_tokens": ANSWER_TOKENS, **sampling}
        self.conversation = Conversation(model=model.name)
        self.show_stats = console.interactive
        self.path: Path | None = None
        self._saving = save
        self._leaving = False
        self._failed = False
        self._told = ""  # the last note about the template
        self._last: Any = None  # the last piece of the last answer
        folder = transcript.data_folder() if save else None
        console.use(commands.complete, folder / "history" if folder else None)

    @property
    def model(self) -> Any:
        """The model; one that is being opened is waited for. Raises OpeningFailed."""
        return self._model.wait() if isinstance(self._model, Opening) else self._model

    def loop(self) -> int:
        """Read and answer until the end of the input; returns the exit status."""
        interrupted = False
        while not self._leaving:
            try:
                line = self.console.read()
                interrupted = False
                self._handle(line)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.console.interactive:
                    raise
                if interrupted:
                    self.console.note("Ctrl-D leaves")
                interrupted = True
            except PocketlmError as error:
                self._failed = True
                self.console.note(f"pocketlm: {error}", style="")
        return int(self._failed and not self.console.interactive)

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            commands.run(self, line)  # pyright: ignore[reportArgumentType]: it sees the installed package's Chat as another
        elif line.strip():
            self.ask(line[1:] if line.startswith("//") else line)

    def ask(self, question: str) -> None:
        """Put a question, stream the answer, keep both. A question that gets no answer is taken back."""
        messages = self.conversation.messages
        messages.append({"role": "user", "content": question})
        answer, last = [], None
        try:
            with self.console.interruptible() as cancel:
                for last in self.model.chat(self.conversation.for_model(), cancel=cancel, **self.sampling):
                    answer.append(last.text)
                    self.console.write(last.text)
        except KeyboardInterrupt:
            if not self.console.interactive:
                raise
        finally:
            text = "".join(answer)
            if text or (last is not None and last.finish_reason == "stop"):
                messages.append({"role": "assistant", "content": text})
            else:
                messages.pop()
        self._last = last if last is not None and last.finish_reason else None
        self.console.end_line()
        self._report()
        self.save()

    def _report(self) -> None:
        note = self.model.template.note
        if note != self._told:
            self._told = note
            self.console.note(note)
        if self._last is None or self._last.finish_reason == "cancelled":
            self.console.note("(stopped)")
        if self._last is not None:
            if self._last.note:
                self.console.note(self._last.note)
            if self.show_stats:
                self.console.note(self._figures())

    def _figures(self) -> str:
        last, used, n_ctx = self._last, self.model.context_used, self.model.n_ctx
        speed = last.generated_tokens / last.generation_seconds if last.generation_seconds else 0.0
        cut = " · cut off" if last.finish_reason == "length" else ""
        tokens = _count(last.generated_tokens, "token")
        return f"{speed:.1f} tokens/s · {tokens} · context {used}/{n_ctx} ({used / n_ctx:.0%}){cut}"

    def statistics(self) -> list[str]:
        """Lines about the model and the last answer."""
        model, last = self.model, self._last
        threads, turns = _count(model.n_threads, "thread"), _count(self.conversation.n_turns, "turn")
        lines = [f"{model.name} · {model.backend} · {threads} · {turns}"]
        if last is not None:
            new = last.prompt_tokens - last.cached_tokens
            speed = new / last.prompt_seconds if last.prompt_seconds else 0.0
            lines.append(self._figures())
            lines.append(f"prompt: {new} new tokens, {last.cached_tokens} from the cache, {speed:.0f} tokens/s")
        return lines

    # ---- what the commands do

    def leave(self) -> None:
        """End the loop."""
        self._leaving = True

    def reset(self) -> None:
        """Begin anew, in a new file; the system prompt stays."""
        self.conversation = Conversation(self.conversation.system, model=self._model.name)
        self.path = None
        self.console.note("a new conversation")

    def undo(self) -> str | None:
        """Take back the last question and its answer; returns the question."""
        messages = self.conversation.messages
        start = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if start is None:
            self.console.note("there is no question to take back")
            return None
        question = messages[start]["content"]
        del messages[start:]
        self.console.note(f"taken back: {question}")
        self.save()
        return question

    def retry(self) -> None:
        """Ask the last question again."""
        question = self.undo()
        if question is not None:
            self.ask(question)

    def save(self) -> None:
        """Write the conversation to its file; the first time this fails is also the last."""
        if not self._saving or not (self.conversation.messages or self.path):
            return
        try:
            self.path = self.path or transcript.new_path()
            transcript.save(self.path, self.conversation)
        except PocketlmError as error:
            self._saving = False
            self.console.note(f"{error}; it goes on without")

    def resume(self, path: Path | None) -> None:
        """Go on with the conversation in a file, or with the last one. Raises FileError."""
        path = path or transcript.latest()
        if path is None:
            self.console.note("there is no saved conversation yet: a new one begins")
            return
        self.conversation, self.path = transcript.load(path), path
        turns = _count(self.conversation.n_turns, "turn")
        self.console.note(f"resumed: {turns} with {self.conversation.model or 'a model'}, {path}")
        if self.console.interactive and self.conversation.messages:
            question, *answers = self.conversation.messages[-2:]
            self.console.note("\n".join([f"> {question['content']}", *(answer["content"] for answer in answers)]))
        self.conversation.model = self._model.name
