"""The face: what an answer must be like, as options, and the guide that lets through what fits.

In: a tokenizer's tokens and the options of an answer. Out: a `Guide`, which says what may come next. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pocketlm import locks
from pocketlm.constrain import json_texts, patterns
from pocketlm.constrain.automaton import Automaton, build
from pocketlm.constrain.grammar import Choice, Grammar
from pocketlm.constrain.masks import Masks
from pocketlm.constrain.schema import grammar_of
from pocketlm.constrain.states import WHOLE
from pocketlm.constrain.vocabulary import Vocabulary
from pocketlm.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from pocketlm.runtime.sampling import Sampler

KEPT = 6  # forms whose masks are remembered
MOST_CHOICE_CHARACTERS = 100_000


class Tokens(Protocol):
    """What is asked of a tokenizer here."""

    def all_bytes(self) -> list[bytes]: ...
    def special_ids(self) -> list[int]: ...
    def is_control(self, token_id: int) -> bool: ...
    def starts_anew_after(self, token_id: int) -> bool: ...


Form = tuple[str, str]  # the option's name, and its value as a text


def take_form(options: dict[str, Any]) -> Form | None:
    """What the options ask for, which are taken out of them. Raises UsageError.

    `json_object=True`: any JSON object. `json_schema`: a schema, as an object or its text. `choices`: one of these texts.
    `regex`: the whole answer matches it.
    """
    given = {name: value for name in FORMS if (value := options.pop(name, None)) is not None}
    if given.get("json_object") is False:  # as a schema it lets nothing through
        del given["json_object"]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: an answer has one form; give one of them")
    for name, value in given.items():
        return name, FORMS[name][0](value)
    return None


def _flag_text(value: Any) -> str:
    if value is not True:
        raise UsageError(f"json_object is {value!r}; it must be True or False")
    return ""


def _schema_text(schema: Any) -> str:
    try:
        return json.dumps(json.loads(schema) if isinstance(schema, str) else schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"json_schema is no JSON: {error}") from None


def _choices_text(choices: Any) -> str:
    texts = [] if isinstance(choices, str | bytes) or not isinstance(choices, Sequence) else list(choices)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UsageError("choices must be a list of texts, each of at least one character")
    if sum(map(len, texts)) > MOST_CHOICE_CHARACTERS:
        raise UsageError(f"choices have more than {MOST_CHOICE_CHARACTERS} characters")
    return json.dumps(texts)


def _regex_text(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise UsageError(f"regex is {pattern!r}; it must be a text")
    return pattern


# option -> its value as a text, and the grammar of that. Raise UsageError
FORMS: dict[str, tuple[Callable[[Any], str], Callable[[str], Grammar]]] = {
    "json_object": (_flag_text, lambda _: Grammar(json_texts.ANY_OBJECT, json_texts.RULES, "json_object")),
    "json_schema": (_schema_text, lambda value: grammar_of(json.loads(value))),
    "choices": (_choices_text, lambda value: Grammar(Choice(tuple(json.loads(value))), {}, "choices")),
    "regex": (_regex_text, lambda value: Grammar(patterns.whole(value), {}, "regex")),
}


def check_form(options: Mapping[str, Any]) -> None:
    """Raises UsageError where what the options ask for cannot be had from any model."""
    if form := take_form(dict(options)):
        _automaton(form)


def _automaton(form: Form) -> tuple[Automaton, str]:
    """The automaton of a form, and what errors call it."""
    name, value = form
    grammar = FORMS[name][1](value)
    return build(grammar), grammar.of


class Guides:
    """One model's vocabulary as a tree, and the masks of the forms that were asked for last. Any thread may use it."""

    def __init__(self, tokenizer: Tokens, end_ids: frozenset[int], n_vocab: int):
        self._tokenizer, self._end_ids, self._n_vocab = tokenizer, end_ids, n_vocab
        self._lock, self._reading = locks.ForkedLock(), locks.ForkedLock()
        self._vocabulary: Vocabulary | None = None
        self._kept: dict[Form, Masks] = {}

    def guide(self, form: Form) -> Guide:
        """For one answer. Raises UsageError for a form that is not supported, or too large."""
        with self._lock.here:
            masks = self._kept.pop(form, None)
            if masks is not None:
                self._kept[form] = masks  # the last one is the newest
        if masks is None or masks.is_large:  # answers that are being written keep theirs
            automaton, of = _automaton(form)
            masks = Masks(automaton, self._read(), of)
            with self._lock.here:
                self._kept[form] = masks
                while len(self._kept) > KEPT:
                    del self._kept[next(iter(self._kept))]
        return Guide(masks)

    def _read(self) -> Vocabulary:
        with self._reading.here:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokens(), sorted(self._end_ids), self._n_vocab)
            return self._vocabulary

    def _tokens(self) -> list[bytes]:
        """The bytes of every token; none where it may not be written as text."""
        tokenizer = self._tokenizer
        tokens = tokenizer.all_bytes()
        for id in tokenizer.special_ids():
            # after some markers of SentencePiece's a token loses its space: what it would be depends on them
            if tokenizer.is_control(id) or tokenizer.starts_anew_after(id):
                tokens[id] = b""
        for id in self._end_ids:
            tokens[id] = b""
        return tokens


class Guide:
    """Along one answer: which tokens may come next."""

    def __init__(self, masks: Masks):
        self._masks, self._state = masks, masks.start
        masks.mask(self._state)

    def allowed(self) -> np.ndarray:
        """What may come next, as a sampler asks for it."""
        return self._masks.mask(self._state)

    def follow(self, id: int) -> None:
        """Go on: this token was drawn."""
        data = self._masks.vocabulary.tokens[id]
        if data:  # not an end
            self._state = self._masks.advance(self._state, data)
            if self._masks.is_large:
                self._masks, self._state = self._masks.anew(self._state)

    def along(self, sampler: Sampler) -> Sampler:
        """The sampler; what it draws is followed."""
        return (_FollowedInside if hasattr(sampler, "prepare") else _Followed)(self, sampler)

    def is_over(self) -> bool:
        """Whether the answer is whole and nothing can be added to it. Otherwise what may come is computed here, so that a pass
        that others wait for has it at once. Raises UsageError, as `Masks.mask`.
        """
        if self._state <= {WHOLE}:
            return True
        return not len(self._masks.mask(self._state))


class _Followed:
    """A sampler whose tokens a guide follows."""

    def __init__(self, guide: Guide, sampler: Any):
        self._guide, self._sampler = guide, sampler

    def __call__(self, logits: np.ndarray, ids: Sequence[int]) -> tuple[int, float]:
        drawn = self._sampler(logits, ids)
        self._guide.follow(drawn[0])
        return drawn


class _FollowedInside(_Followed):
    """One that draws inside passes, a token in each: what may come after it is found out between two."""

    def __init__(self, guide: Guide, sampler: Any):
        super().__init__(guide, sampler)
        self.MOST, self.prepare, self.begin, self.ids = sampler.MOST, sampler.prepare, sampler.begin, sampler.ids

    def take(self, n: int) -> list[tuple[int, float]]:
        drawn = self._sampler.take(n)
        for id, _ in drawn:
            self._guide.follow(id)
        return drawn
