"""A conversation as the text, and as the ids, that a model was trained to continue.

In: messages `[{"role": "user", "content": "…"}, …]`, the chat template of the model file or the name of a built-in
one, a tokenizer. Out: `Template`, with `render` (text) and `encode` (ids, in which only the template's own markers are
control tokens). Knows no weights; Jinja is imported when the first conversation is rendered, by `sandbox`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.chat.markers import Markers, encode_between, without_markers
from pocketlm.chat.thinking import Tags, tags_of
from pocketlm.errors import FileError, PocketlmError, UsageError, refused
from pocketlm.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that says whether the model is to think
_PRIVATE = re.compile("([\U000f0000-\U000fffff])")  # characters without a meaning, which stand in for contents


@dataclass(frozen=True)
class BuiltIn:
    """A template that is a table: what stands before and after the content of each role.

    `needs`: it fits a model whose vocabulary has all of these as tokens, or whose own template writes them.
    `stop`: texts that end an answer where the model's end-of-turn token does not.
    """

    name: str
    roles: Mapping[str, tuple[str, str]]
    needs: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    default_system: str = ""

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        rows = [(*self.roles.get(message["role"], self.roles["user"]), message["content"]) for message in messages]
        turns = "".join(before + content + after for before, after, content in rows)
        return turns + self.roles["assistant"][0] * add_generation_prompt

    @property
    def markers(self) -> tuple[str, ...]:
        """The markers that the template writes; those that end a turn come last."""
        sides = self.roles.values()
        written = "".join([before for before, _ in sides] + [after for _, after in sides])
        return tuple(dict.fromkeys(re.findall(r"<\|\w+\|>", written)))

    @property
    def jinja(self) -> str:
        """The template in Jinja, for a model file."""
        if self.name == "plain":
            return PLAIN_JINJA

        def turn(role: str, sides: tuple[str, str]) -> str:
            before, after = (side.replace("\n", "\\n").replace("user", role) for side in sides)
            return f"""{{{{- '{before}' + message['content'] + '{after}' }}}}"""

        before, after = self.roles["user"]
        loop = turn("' + message['role'] + '", (before, after))
        if "user" not in before:  # the roles differ in more than their names
            cases = [f"message['role'] == '{role}' %}}{turn('user', self.roles[role])}" for role in ("system", "assistant")]
            loop = f"{{%- if {cases[0]}{{%- elif {cases[1]}{{%- else %}}{loop}{{%- endif %}}"
        text = f"{{%- for message in messages %}}{loop}{{%- endfor %}}"
        if self.default_system:
            first = "".join((self.roles["system"][0], self.default_system, self.roles["system"][1])).replace("\n", "\\n")
            text = f"{{%- if messages[0]['role'] != 'system' %}}{{{{- '{first}' }}}}{{%- endif %}}{text}"
        prompt = self.roles["assistant"][0].replace("\n", "\\n")
        return f"{text}{{%- if add_generation_prompt %}}{{{{- '{prompt}' }}}}{{%- endif %}}"


def _tagged(before: str, after: str) -> dict[str, tuple[str, str]]:
    return {role: (before.format(role), after) for role in ("system", "user", "assistant")}


BUILT_IN = {
    row.name: row
    for row in (
        BuiltIn("chatml", _tagged("<|im_start|>{}\n", "<|im_end|>\n"), ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",)),
        BuiltIn("markers", _tagged("<|{}|>\n", "<|end|>\n"), ("<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",)),
        BuiltIn(
            "alpaca",
            {"system": ("", "\n\n"), "user": ("### Instruction:\n", "\n\n"), "assistant": ("### Response:\n", "\n\n")},
            ("### Instruction:",),
            ("### Instruction:",),
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ),
        # Base models: what the model writes goes on where the text ends; each new text starts on a new line.
        BuiltIn("plain", {"system": ("", "\n"), "user": ("", ""), "assistant": ("", "\n")}),
    )
}
# What the file of a model says that was trained on texts alone: its vocabulary may have chat markers that it never met.
PLAIN_JINJA = (
    "{%- for message in messages %}{{- message['content'] }}{%- if message['role'] != 'user' %}{{- '\\n' }}{%- endif %}"
    "{%- endfor %}"
)


class Template:
    """The chat template of one model. `source` is Jinja, or None if `built_in` is the template.

    When the Jinja fails, the built-in template is used instead, and `note` says so in one line: from then on if the Jinja is
    broken, once if it refuses a conversation. Else `note` is "".
    """

    def __init__(self, source: str | None, built_in: BuiltIn, bos_token: str = "", eos_token: str = ""):
        self.source, self.built_in = source, built_in
        self.note = ""
        self.tags: Tags = tags_of(source or "")
        self._thinking: bool | None = None
        self._thought_opening: str | None = None
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled: Any = None
        self._in_parts: bool | None = None  # whether contents are lists of parts
        self._markers: Markers | None = None

    @property
    def name(self) -> str:
        """What to call it: the built-in name, or "the model's own"."""
        return self.built_in.name if self.source is None else "the model's own"

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the end-of-turn tokens of the vocabulary."""
        return self.built_in.stop if self.source is None else ()

    @property
    def has_switch(self) -> bool:
        """Whether the template knows a variable for thinking."""
        return any(re.search(rf"\b{name}\b", self.source or "") for name in _SWITCHES)

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think before it answers; None: the template's default."""
        return self._thinking

    @thinking.setter
    def thinking(self, wanted: bool | None) -> None:
        self._thinking, self._thought_opening = wanted, None

    def with_thinking(self, wanted: bool | None) -> Template:
        """A copy with another value of `thinking`."""
        other = copy.copy(self)
        other.thinking = wanted
        return other

    @property
    def thought_opening(self) -> str:
        """The end of the generation prompt from the thinking tag on, for templates that write the tag themselves; else ""."""
        if self._thought_opening is None:
            self._thought_opening, tag = "", self.tags[0]
            if self.source is not None and tag in self.source:
                try:
                    text = self._render_jinja([{"role": "user", "content": "."}], True)
                except PocketlmError:
                    text = ""
                at = text.rfind(tag)
                if at >= 0 and not text[at + len(tag) :].strip():
                    self._thought_opening = text[at:]
        return self._thought_opening

    def begun(self, content: str) -> str:
        """`content`, the begun answer, without the thinking tag that the generation prompt writes already."""
        tag, opening = self.tags[0], self.thought_opening
        if opening and content.startswith(tag):
            return content.removeprefix(opening) if content.startswith(opening) else content[len(tag) :].lstrip("\n")
        return content

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as text, followed by the generation prompt if `add_generation_prompt`.

        Raises UsageError for messages that are not dicts of two texts, `role` and `content`.
        """
        return self._render(_checked(messages), add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self.source is not None:
            from pocketlm.chat.budget import TemplateError, TemplateRaised

            try:
                return self._render_jinja(messages, add_generation_prompt)
            except TemplateRaised as error:
                self.note = f"the model's chat template refuses this conversation ({error}): {self.built_in.name} is used"
            except TemplateError as error:
                self.note = f"the model's chat template cannot be used ({error}): {self.built_in.name} takes its place"
                self.source = None
        return self.built_in.render(messages, add_generation_prompt)

    def _render_jinja(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The messages as rendered by the model's own template. Raises TemplateError."""
        from pocketlm.chat.budget import TemplateError, TemplateRaised
        from pocketlm.chat.sandbox import SandboxedTemplate

        self._compiled = self._compiled or SandboxedTemplate(self.source or "")
        variables = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None, **self._tokens}
        if self._thinking is not None:
            variables |= dict.fromkeys(_SWITCHES, self._thinking)
        size = sum(len(message["content"]) for message in messages)

        def render(messages: list[dict[str, str]], in_parts: bool) -> str:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] if in_parts else messages
            return self._compiled.render({**variables, "messages": shown}, size)

        if self._in_parts is None:
            self._in_parts = _wants_parts(render)
        try:
            return render(messages, self._in_parts)
        except TemplateRaised as refusal:
            folded = _fold_system(messages)
            if folded is None:
                raise
            try:
                return render(folded, self._in_parts)
            except TemplateError:
                raise refusal from None

    def encode(self, messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = True) -> list[int]:
        """The conversation as ids, with the begin-of-sequence token in front if the model wants it.

        Equal to `tokenizer.encode(render(messages), special=True)`, except that a marker which a content spells, such as
        `<|im_end|>` typed by a user, is encoded as ordinary text. Raises UsageError for texts that the tokenizer cannot encode.
        """
        checked = _checked(messages)
        text = self._render(checked, add_generation_prompt)
        parts = self._parts(checked, text, add_generation_prompt)
        own_bos = self._tokens["bos_token"]  # which the template may write itself; what a content spells is none
        writes_bos = bool(own_bos) and text.startswith(own_bos) and (parts is None or not parts[0][1])
        bos = tokenizer.adds_bos and not writes_bos
        ids = tokenizer.encode(text, special=True, bos=bos)
        if parts is None:
            safe = without_markers(checked, tokenizer)
            if safe == checked:
                return ids
            return tokenizer.encode(self._render(safe, add_generation_prompt), special=True, bos=bos)
        written = frozenset(part for part, is_content in parts if not is_content)
        markers = self._markers
        if markers is None or markers.made_of != (tokenizer, written):  # else those of the last conversation will do
            markers = self._markers = Markers(tokenizer, written)
        own, position = [], 0
        for part, is_content in parts:
            if not is_content:
                own += [(position + start, position + stop, i) for start, stop, i in markers.in_template(part)]
            position += len(part)
        if list(markers.places(text, ids[bos and tokenizer.bos_id is not None :])) == own:
            return ids
        return encode_between(text, own, tokenizer, markers, bos)

    def _parts(self, messages: list[dict[str, str]], text: str, add_generation_prompt: bool) -> list[tuple[str, bool]] | None:
        """`text` as (piece, is content) in order; None for a template that changes the contents.

        Found by rendering again with a private-use character in place of each content, but not of the white space around it,
        which templates trim. Putting the contents back must give `text`. In an answer, thought and reply get a character each
        and the tags are kept, because a template may leave the thought out.
        """
        tags = re.compile(f"({'|'.join(map(re.escape, self.tags))})")
        stand_ins: dict[str, str] = {}
        masked = []
        for message in messages:
            pieces = tags.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
            for n in range(0, len(pieces), 2):
                if content := pieces[n].strip():
                    mark = chr(0xF0000 + len(stand_ins))
                    stand_ins[mark], pieces[n] = content, pieces[n].replace(content, mark, 1)
            masked.append({**message, "content": "".join(pieces)})
            if len(stand_ins) > 0xF000:
                return None
        if _PRIVATE.search(text):
            return None
        render = self.built_in.render if self.source is None else self._render_jinja
        try:
            pieces = _PRIVATE.split(render(masked, add_generation_prompt))
        except PocketlmError:  # a template that looks into the contents may refuse the stand-ins
            return None
        parts = [(stand_ins.get(piece, piece), piece in stand_ins) for piece in pieces if piece]
        return parts if "".join(part for part, _ in parts) == text else None


def _checked(messages: Messages) -> list[dict[str, str]]:
    """Copies of the messages, plain dicts of plain texts. Raises UsageError."""
    copies = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not (isinstance(role, str) and isinstance(content, str)):
            raise UsageError("a message is a dict of two texts, 'role' and 'content'")
        if not re.fullmatch(r"[A-Za-z][\w-]*", role):
            raise UsageError(f"{role[:40]!r} is no role: use system, user or assistant")
        copies.append({"role": str(role), "content": str(content)})
    if not copies:
        raise UsageError("a conversation has at least one message")
    return copies


def _wants_parts(render: Callable[[list[dict[str, str]], bool], str]) -> bool:
    """Whether a template fails on contents that are texts, or leaves them out, and takes lists of parts: those of models that
    see pictures.
    """
    from pocketlm.chat.budget import TemplateError, TemplateRaised

    question = {"role": "user", "content": "\U000f0000"}
    for messages in ([{"role": "system", "content": "."}, question], [question]):
        for in_parts in (False, True):
            try:
                if question["content"] in render(messages, in_parts):
                    return in_parts
            except TemplateRaised:  # it knows no system role
                break
            except TemplateError:
                pass
    return False


def _fold_system(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The messages with the system prompt in front of the first question, for templates that know no system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    text = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{"role": "user", "content": text}, *messages[2:]]


def choose(source: object, tokenizer: Tokenizer) -> Template:
    """The template for a model: the Jinja `source` of its file, else the built-in one that fits its vocabulary.

    A `source` that is no text, or an empty one, counts as none; a file can hold anything there.
    """
    jinja = source if isinstance(source, str) and source.strip() else None

    def fits(row: BuiltIn) -> bool:
        return all(tokenizer.token_id(marker) is not None or marker in (jinja or "") for marker in row.needs)

    built_in = BUILT_IN["plain"] if jinja == PLAIN_JINJA else next(row for row in BUILT_IN.values() if fits(row))
    bos, eos = (
        "" if token_id is None else tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        for token_id in (tokenizer.bos_id, tokenizer.eos_id)
    )
    template = Template(None if jinja == PLAIN_JINJA else jinja, built_in, bos, eos)
    if source is not None and jinja is None:
        template.note = f"the model's chat template is no text: {built_in.name} takes its place"
    return template


def named(name: str, tokenizer: Tokenizer) -> Template:
    """The template that a user asked for: a built-in name, or the path of a file with Jinja in it."""
    if name in BUILT_IN:
        return Template(None, BUILT_IN[name])
    path = Path(name)
    if not path.is_file():
        raise FileError(name, "no such template file", f"or use a built-in one: {', '.join(BUILT_IN)}")
    with refused(name):
        return choose(path.read_text(encoding="utf-8-sig"), tokenizer)


def continued(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text that continues another, such as the second part of an answer; markers in it are spelled."""
    before = "\n"
    ids = tokenizer.encode(before + text)[len(tokenizer.encode(before)) :] if tokenizer.encodable(before) else []
    stream = tokenizer.stream_decoder(continues=True)
    exact = "".join(map(stream.push, ids)) + stream.flush() == text
    return ids if exact else tokenizer.encode(text)
