"""One conversation in progress: what was said, how answers are sampled, where it is kept.

In: questions, and what slash commands ask for. Out: answers and notes on a console, a file that is always up to date. Knows
neither the commands nor where questions come from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pocketlm import locks
from pocketlm.chat import saved, states
from pocketlm.chat.console import DIM, Console
from pocketlm.chat.endings import Endings
from pocketlm.chat.opening import Opening
from pocketlm.chat.thinking import Splitter, split
from pocketlm.chat.transcript import Conversation, Record, shown
from pocketlm.constrain import OPTIONS
from pocketlm.errors import PocketlmError
from pocketlm.terminal_text import count

ANSWER_TOKENS = 1024  # the longest answer unless asked for another: a small model may never find its end
MORE = "/more continues"


class Chat:
    """A conversation with a model. `model_id`: identifies the model's saved conversations; "": the model's fingerprint."""

    def __init__(
        self, model: Any, console: Console, sampling: dict[str, Any], save: bool, model_id: str = "", program: str = "pocketlm"
    ):  # fmt: skip
        self._model, self.console, self.program = model, console, program
        self.sampling = {"max_tokens": ANSWER_TOKENS, **sampling}
        self.conversation = self._begun()
        self.record = Record()
        self.copies: dict[Path, Record] = {}  # the files that /save has written
        self.show_stats = self.show_thoughts = console.interactive
        self._wish: bool | None = None  # whether the model is to think before it answers; None: as its template does
        self.leaving = self.failed = False
        self.endings = Endings(self.keep, console.leave_editor)
        self._saving, self._lock = save, locks.lock()
        self._unsaved = False  # whether the last save failed, which was said
        self._given_id = model_id
        self._told = ""  # the last note about the template
        self._forgotten = 0  # turns, as the last note about them said
        self._unknown: set[str] = set()  # characters of which a note has said that the vocabulary lacks them
        self._restorable = False  # whether a state may have been kept of what was resumed
        self._last: Any = None  # the last piece of the last answer; None also where more was computed than is to be kept
        self.watch: Callable[[], str] = lambda: ""  # what there is to say of the machine after an answer
        self._in_thought = False  # whether what was shown last was one

    @property
    def model(self) -> Any:
        """The model; waits for one that is still being opened. Raises OpeningFailed."""
        return self._model.wait() if isinstance(self._model, Opening) else self._model

    @property
    def model_id(self) -> str:
        """What identifies this model's saved conversations."""
        return self._given_id or self.model.fingerprint

    def _begun(self, system: str = "") -> Conversation:
        return Conversation(system, model=self._model.name, interactive=self.console.interactive)

    # ---- questions and answers

    def ask(self, question: str) -> None:
        """Ask a question, stream the answer, save both. A question without an answer is removed again."""
        new: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": "", "cut": True}]
        self.conversation.messages += new
        self.save()  # so that the question is kept whatever happens
        self._answer(self.conversation.messages[:-1], new)

    def more(self) -> None:
        """Continue an answer that was cut off."""
        messages = self.conversation.messages
        answer: dict[str, Any] = messages[-1] if messages else {"role": ""}
        if answer["role"] != "assistant":
            return self.console.note("there is no answer to continue yet")
        if not answer.get("cut") and self.model.template.name != "plain":  # a base model's text has no end
            return self.console.note("the last answer has come to its end")
        answer["cut"] = True
        answer["content"] = answer["content"].rstrip("\ufffd")  # the first bytes of a character that was cut
        self._answer(messages if answer["content"] else messages[:-1], [])

    def _answer(self, messages: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """Stream the answer to `messages` into the conversation's last message. If none comes, the messages in `new` are
        removed.
        """
        answer, last = self.conversation.messages[-1], None
        try:
            self.endings.check()
            given = self._encodable(Conversation(self.conversation.system, messages).for_model())
            with self.console.interruptible() as cancel:
                begun = answer["content"] or self._opening()
                parts = Splitter(self.model.template.tags, begun)
                before = None
                for last in self.model.chat(given, cancel=cancel, **self.sampling):
                    if before is not None:  # with the first it is not known yet whether the question itself fits
                        self._report_forgotten(before)
                    before = last
                    if last.text:
                        answer["content"] = (answer["content"] or begun) + last.text
                    self._show(parts.push(last.text))
                self._show(parts.flush())
        except PocketlmError:
            self._last = None
            self._take_back(new)
            self.save()
            raise
        except BaseException as error:  # told to end, or the terminal is gone: both are kept, the answer as one that was cut
            if not (isinstance(error, KeyboardInterrupt) and self.console.interactive):
                self.keep()
                raise
        self._last = last if last is not None and last.finish_reason else None
        if self._last is not None and self._last.finish_reason == "stop":
            del answer["cut"]
        else:
            self._take_back(new)
        self._in_thought = False
        self.console.end_line()
        self.save()
        self._report()

    def _opening(self) -> str:
        """The text that the template begins the answer with, told whether the model is to think. A constrained answer has its
        form from the first token on, which leaves no room for thought.
        """
        template, has_form = self.model.template, any(self.sampling.get(name) not in (None, False) for name in OPTIONS)
        wish = False if has_form else self._wish
        if template.thinking != wish:
            template.thinking = wish
            if self._wish is not None and not template.has_switch:
                self.console.note("this model's template has no switch for thinking; /think hide hides what it thinks")
        return "" if has_form else template.thought_opening

    def _show(self, parts: Iterable[tuple[bool, str]]) -> None:
        """Write parts of an answer. Thoughts are dimmed, or hidden behind a short note."""
        for is_thought, text in parts:
            if is_thought and not self.show_thoughts:
                if self.console.interactive and not self._in_thought:
                    self.console.note("(thinking)")
            else:
                if self._in_thought and not is_thought:
                    self.console.end_line()
                self.console.write(text, DIM if is_thought else "")
            self._in_thought = is_thought

    def _take_back(self, new: list[dict[str, Any]]) -> None:
        """Remove the question and the answer in `new` if the answer is empty."""
        if new and not new[-1]["content"]:
            self._cut(len(self.conversation.messages) - len(new))

    def _cut(self, start: int, last: int = 0) -> None:
        """Remove the messages from `start` on, and the branches behind both `start` and `last`, which belonged to them."""
        del self.conversation.messages[start:]
        branches = self.conversation.branches
        branches[:] = [other for other in branches if other["at"] <= max(start, last)]
        self._last = None

    def _encodable(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages without characters that the vocabulary lacks; a note names each once. Raises PocketlmError if nothing
        of the last message is left.
        """
        encodable = self.model.tokenizer.encodable
        known = [{**message, "content": encodable(message["content"])} for message in messages]
        lost = {c for message in messages for c in message["content"]} - {c for message in known for c in message["content"]}
        new = sorted(lost - self._unknown)
        self._unknown |= lost
        if new:
            shown = [c if c.isprintable() and c != " " else f"U+{ord(c):04X}" for c in new]
            shown = shown if len(shown) <= 20 else [*shown[:20], "…"]
            self.console.note(f"left out, because this model does not know {'them' if new[1:] else 'it'}: {' '.join(shown)}")
        if messages[-1]["content"].strip() and not known[-1]["content"].strip():
            raise PocketlmError("this model knows none of the message's characters")
        return known

    # ---- what is said about answers

    def _report_forgotten(self, piece: Any) -> None:
        if piece.dropped_turns > self._forgotten:
            turns = "oldest turn was" if piece.dropped_turns == 1 else f"{piece.dropped_turns} oldest turns were"
            self.console.note(f"the {turns} forgotten")
        if piece.dropped_turns or piece.finish_reason:
            self._forgotten = piece.dropped_turns
        if piece.note:
            self.console.note(piece.note)

    def _report(self) -> None:
        note, last = self.model.template.note, self._last
        if note != self._told:
            self._told = note
            self.console.note(note)
        if last is None or last.finish_reason == "cancelled":
            self.console.note("(stopped)")
        if last is not None:
            self._report_forgotten(last)
            if self.show_stats:
                self.console.note(self._figures())
            elif last.finish_reason == "length" and self.console.interactive:
                self.console.note(f"(cut off: {MORE})")
            if about_machine := self.watch():
                self.console.note(about_machine)

    def _figures(self) -> str:
        last, used, n_ctx = self._last, self.model.context_used, self.model.n_ctx
        cut = f" · cut off, {MORE}" if last.finish_reason == "length" else ""
        tokens = count(last.generated_tokens, "token")
        return f"{last.tokens_per_second:.1f} tokens/s · {tokens} · context {used}/{n_ctx} ({used / n_ctx:.0%}){cut}"

    def statistics(self) -> list[str]:
        """Lines about the model and the last answer."""
        model, last = self.model, self._last
        threads, turns = count(model.n_threads, "thread"), count(self.conversation.n_turns, "turn")
        lines = [f"{model.name} · {model.backend} · {threads} · {turns}"]
        if last is not None:
            new = last.prompt_tokens - last.cached_tokens
            speed = new / last.prompt_seconds if last.prompt_seconds else 0.0
            lines.append(self._figures())
            lines.append(f"prompt: {count(new, 'new token')}, {last.cached_tokens} from the cache, {speed:.0f} tokens/s")
            if last.drafted_tokens:
                drafted = count(last.drafted_tokens, "token")
                lines.append(f"drafts from the conversation: {last.accepted_tokens} of {drafted} accepted")
        return lines

    # ---- what the commands do

    def leave(self) -> None:
        """End the chat after this command."""
        self.leaving = True

    def reset(self) -> None:
        """Begin anew, in a new file; the system prompt stays."""
        self.conversation, self.record = self._begun(self.conversation.system), Record()
        self._forgotten, self._last = 0, None
        self.console.note("a new conversation")

    def undo(self, again: bool = False) -> str | None:
        """Remove the last question and its answer; returns the question. `again`: it will be asked again."""
        messages = self.conversation.messages
        start = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if start is None:
            self.console.note("there is no question to take back")
            return None
        question = messages[start]["content"]
        self._cut(start, start + again)
        if self._saving and self.record.path is not None:
            states.forget(self.record.path)
        self.console.note(f"{'asked again' if again else 'taken back'}: {question}")
        self.save()
        return question

    def retry(self) -> None:
        """Ask the last question again."""
        question = self.undo(again=True)
        if question is not None:
            self.ask(question)

    def think(self, wanted: str) -> None:
        """Whether the model thinks before it answers ("on", "off"), if its template can say so; "hide": thoughts are hidden."""
        self.show_thoughts = wanted != "hide" and self.console.interactive
        if wanted != "hide":
            self._wish = wanted == "on"

    def thoughts(self) -> str:
        """The present setting of `think`, in a word or two."""
        wish = {None: "as the model's template does", True: "on", False: "off"}[self._wish]
        return wish + (", hidden" if not self.show_thoughts else "")

    def resume(self, path: Path | None) -> None:
        """Go on with the conversation in a file, or with the last one that was held with this model. Raises FileError."""
        path = path or saved.latest(self.model_id)
        if path is None:
            piped = saved.latest(self.model_id, interactive=False)
            other = f", but for a program's (--resume {piped.stem})" if piped else ""
            self.console.note(f"there is no saved conversation with this model yet{other}: a new one begins")
            return
        record = Record()
        conversation = record.load(path)
        turns, name = count(conversation.n_turns, "turn"), conversation.model or "a model"
        other = " (another model)" if conversation.model_id and conversation.model_id != self.model_id else ""
        self.conversation, self.record, self._forgotten, self._last = conversation, record, 0, None
        self.console.note(f"resumed: {turns} with {name}{other}, {shown(path)}")
        if self.console.interactive and conversation.messages:
            question, *answers = conversation.messages[-2:]
            self.console.note("\n".join([f"> {question['content']}", *(split(answer["content"])[1] for answer in answers)]))
            if conversation.messages[-1].get("cut"):
                self.console.note(f"(cut off: {MORE})")
        self._restorable = self._saving
        opening = self._model if isinstance(self._model, Opening) else None
        if opening is None or opening.is_open:
            self.restore(self.model)
        conversation.model = self._model.name
        conversation.interactive |= self.console.interactive

    def restore(self, model: Any) -> None:
        """Load the state that was kept with the resumed conversation into the model, which has just been opened."""
        if self._restorable and self.record.path is not None:
            self._restorable = False
            states.restore(model, self.record.path)

    # ---- its file

    def keep_state(self) -> None:
        """At the end: save the model's state, so that the conversation can be resumed at once."""
        if self._saving and self._last is not None and self.record.path is not None:
            states.keep(self.model, self.record.path)

    def save(self) -> None:
        """Write the conversation to its file; an empty one has none. A failure is told once, and the next turn tries again."""
        with self.endings.held():
            if note := self.keep():
                self.console.note(note)

    def keep(self) -> str:
        """`save` without its note, which is returned ("" for none). For any thread, also when the process is about to end."""
        with self._lock:
            try:
                return self._write()
            except PocketlmError as error:
                told, self._unsaved = self._unsaved, True
                return "" if told else f"{error}; it goes on without"

    def _write(self) -> str:
        conversation, path = self.conversation, self.record.path
        if not self._saving:
            return ""
        if not (conversation.messages or conversation.branches):
            self.record.discard()
            return ""
        opening = self._model if isinstance(self._model, Opening) else None
        if self._given_id or opening is None or opening.is_open:  # a save waits for no model
            conversation.model_id = self.model_id
        gone = path is not None and not os.path.lexists(path)
        same, again, self._unsaved = self.record.save(conversation), self._unsaved, False
        if same:
            return "the conversation is saved again" * again
        if gone:
            return f"{shown(path)} was deleted meanwhile: this conversation is kept as {shown(self.record.path)}"
        changed = f"{shown(path)} was changed by another program, and stays as it is"
        return f"{changed}: this conversation goes on as {shown(self.record.path)}"
