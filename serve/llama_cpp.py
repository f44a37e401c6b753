"""The protocol of llama.cpp's own server, for editors and scripts that speak it: `/completion`, `/props`, `/slots`.

In: pieces, an `Answerer`. Out: the objects that llama.cpp's server documents, with the fields that have a meaning here. Knows
no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pocketlm.runtime.sampling_options import SamplingOptions
from pocketlm.serve.fields import SAMPLING, Ask
from pocketlm.serve.shapes import FINGERPRINT, Shape, timings

if TYPE_CHECKING:
    from pocketlm.runtime.generator import Piece
    from pocketlm.serve.answering import Answerer
    from pocketlm.serve.asking import Prompts


class OwnShape(Shape):
    """The objects about one request to `/completion`."""

    each_token, done = True, b""

    def __init__(self, ask: Ask, prompts: Prompts, answerer: Answerer):
        self._tokenizer = answerer.model.tokenizer
        super().__init__(ask, answerer.model.name, self._tokenizer.token_bytes)
        self._prompts, self._n_ctx = prompts, answerer.n_ctx
        self._of_lines = set[int]()  # which answers have a line's end in them

    def delta(self, number: int, text: str, pieces: Sequence[Piece], is_thought: bool = False) -> dict[str, Any]:
        self._of_lines |= {number} if "\n" in text else set()
        return {"index": number, "content": text, "tokens": _ids(pieces), "stop": False, **self._listed(pieces)}

    def end(self, number: int, piece: Piece, dropped_turns: int) -> dict[str, Any]:
        return self._end(number, [piece])

    def whole(self, answers: Sequence[Sequence[Piece]], dropped_turns: int, parts: Any = None) -> Any:
        told = [self._end(number, pieces) for number, pieces in enumerate(answers)]
        return told[0] if len(told) == 1 else told

    def _end(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The final object of an answer; `pieces`: the last one, and those before it that were not sent yet."""
        text, last, ask = "".join(piece.text for piece in pieces), pieces[-1], self._ask
        ended = "limit" if last.finish_reason != "stop" else "word" if last.stop_string else "eos"
        is_full = last.prompt_tokens + last.generated_tokens > self._n_ctx
        return {
            "index": number, "content": text, "tokens": _ids(pieces) if ask.return_tokens else [], "stop": True,
            "model": self._head["model"], "tokens_predicted": last.generated_tokens, "tokens_evaluated": last.prompt_tokens,
            "prompt": self._tokenizer.decode(self._prompts.ids[number // ask.n], special=True),
            "tokens_cached": last.cached_tokens, "has_new_line": "\n" in text or number in self._of_lines,
            "stop_type": ended, "stopping_word": last.stop_string, "timings": timings(last),
            "truncated": ended == "limit" and is_full and last.generated_tokens != ask.options.get("max_tokens"),
            "generation_settings": settings(ask, self._tokenizer.end_ids), **self._listed(pieces),
        }  # fmt: skip

    def _listed(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"completion_probabilities": self._probabilities(pieces)} if self._ask.logprobs else {}


def _ids(pieces: Sequence[Piece]) -> list[int]:
    return [piece.id for piece in pieces if piece.id >= 0]


def settings(ask: Ask, end_ids: Iterable[int]) -> dict[str, Any]:
    """The options of an answer, as llama.cpp writes them: -1 for no limit and for a random seed, null for minus infinity."""
    options = ask.options
    chosen = asdict(SamplingOptions(**{name: options[name] for name in (*SAMPLING, "seed") if name in options}))
    limit, ignores = options.get("max_tokens"), bool(options.get("ignore_eos"))
    bias = {**(options.get("logit_bias") or {}), **dict.fromkeys(sorted(end_ids) if ignores else (), -math.inf)}
    return {
        **chosen, "seed": -1 if chosen["seed"] is None else chosen["seed"],
        **dict.fromkeys(("n_predict", "max_tokens"), -1 if limit is None else limit), "ignore_eos": ignores,
        "stop": [*options.get("stop", ())], "stream": ask.stream, "n_probs": options.get("top_logprobs", 0),
        "logit_bias": [{"token": id, "bias": number if math.isfinite(number) else None} for id, number in bias.items()],
    }  # fmt: skip


def properties(answerer: Answerer, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`/props`. The model's file is named without its folder, which is private."""
    model = answerer.model
    params = settings(Ask(False, options={**defaults}), model.tokenizer.end_ids)
    return {
        "default_generation_settings": {"n_ctx": answerer.n_ctx, "params": params}, "total_slots": len(answerer.slots.all),
        "model_alias": model.name, "model_path": model.path.name, "chat_template": model.template.source or "",
        "modalities": {"vision": False, "audio": False}, "build_info": FINGERPRINT, "is_sleeping": False,
    }  # fmt: skip


def slots(answerer: Answerer) -> list[dict[str, Any]]:
    """`/slots`: which of them are busy, and how many positions each has filled, but no text."""
    return [{"id": number, "n_ctx": answerer.n_ctx, "is_processing": slot.taken > 0,
             "n_past": slot.session.context_used} for number, slot in enumerate(answerer.slots.all)]  # fmt: skip
