"""Where a model thinks before it answers: which part of its text is the thought.

In: the text of an answer, whole or as it comes. Out: the same in parts, thought and answer. A thought stands at the beginning
of an answer, between two tags; the answer's text is kept with them, as templates expect it of earlier turns. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator

Tags = tuple[str, str]
TAGS: tuple[Tags, ...] = (  # Qwen, DeepSeek, SmolLM, GLM, EXAONE, …; Mistral; others
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"), ("<seed:think>", "</seed:think>"),
)  # fmt: skip


def tags_of(template: str) -> Tags:
    """The tags that a template mentions; the first of TAGS if it mentions none."""
    return next((tags for tags in TAGS if tags[1] in template), TAGS[0])


class Splitter:
    """Separates thought from answer in a stream of text. `so_far`: the part of the answer that there is already."""

    def __init__(self, tags: Tags, so_far: str = ""):
        self._open, self._close = tags
        self._held = ""  # what may be the beginning of a tag, or an empty line that nothing follows
        self._state = "before"  # "before", "opened": the tag is there, "thought", "closed", "answer"
        for _ in self.push(so_far):
            pass

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        """Add text; yields the parts (is thought, text) that are certain by now."""
        self._held += text
        while self._held:
            state, part = self._state, self._step()
            if part:
                yield state == "thought", part
            if self._state == state:
                return

    def flush(self) -> Iterator[tuple[bool, str]]:
        """The parts that were held back; to be called at the end."""
        thought, rest = self._state == "thought", self._held
        self._held = ""
        if rest.strip("\n") if thought else rest:
            yield thought, rest.rstrip("\n") if thought else rest

    def whole(self, text: str) -> tuple[str, str]:
        """Add all of a text; (thought, answer)."""
        parts = [*self.push(text), *self.flush()]
        thought, answer = ("".join(part for is_thought, part in parts if is_thought is wanted) for wanted in (True, False))
        return thought, answer

    def _step(self) -> str:
        """Take from the held text what belongs to the present state, and change the state where that ends."""
        held = self._held
        if self._state == "before":
            begun = held.lstrip()
            if begun.startswith(self._open):
                self._state, self._held = "opened", begun[len(self._open) :]
            elif not self._open.startswith(begun):
                self._state = "answer"
            return ""
        if self._state in ("opened", "closed"):
            self._held = held.lstrip("\n")
            if self._held:
                self._state = "thought" if self._state == "opened" else "answer"
            return ""
        if self._state == "thought":
            before, tag, after = held.partition(self._close)
            if tag:
                self._state, self._held = "closed", after
                return before.rstrip("\n")
            keep = next((n for n in range(len(self._close) - 1, 0, -1) if held.endswith(self._close[:n])), 0)
            whole = held[: len(held) - keep].rstrip("\n")
            self._held = held[len(whole) :]
            return whole
        self._held = ""
        return held


def split(text: str) -> tuple[str, str]:
    """(thought, answer) of a saved text, with the tags of any model."""
    begun = text.lstrip()
    tags = next((tags for tags in TAGS if begun.startswith(tags[0])), None)
    if tags is None:
        return "", text
    return Splitter(tags).whole(text)
