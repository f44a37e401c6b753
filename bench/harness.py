"""A model for lm-evaluation-harness (PyPI lm-eval), in its process: `pocketlm` among its models, its own tasks.

    python -m pocketlm.bench.harness --model pocketlm --model_args pretrained=model.gguf --tasks arc_easy

In: the harness's requests. Out: log-likelihoods and completions, several at a time. Knows no task.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    package = str(error.name).partition(".")[0]
    sys.exit(f"pocketlm.bench.harness: the package {package} is not installed; get it with: pip install lm-eval")

import pocketlm
from pocketlm.batch.local import spread
from pocketlm.conversation import Turns
from pocketlm.runtime.evaluation import cross_entropy
from pocketlm.runtime.sampling_options import SamplingOptions
from pocketlm.serve.asking import sessions

SLOTS = 8
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # what is not asked for is off, as it is in the harness's own models

Request = tuple[Any, Sequence[int], Sequence[int]]  # what it is called in the harness's cache, ids, ids that go on from there


@register_model("pocketlm")
class PocketLM(TemplateLM):
    """`pretrained`, `backend`, `threads` and `ctx` are those of `pocketlm.load`. `batch_size`: how many requests are computed
    at the same time; "auto": 8.
    """

    def __init__(
        self, pretrained: str, batch_size: int | str | None = None, backend: str = "auto", threads: int | None = None,
        ctx: int | None = None, max_batch_size: int | None = None, device: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model = pocketlm.load(pretrained, backend, threads, ctx)
        self._vocabulary = self.model.tokenizer
        n = int(batch_size) if batch_size is not None and str(batch_size).isdecimal() else SLOTS
        self._sessions = sessions(self.model, max(1, n))

    # ---- what the harness asks about the model

    @property
    def max_length(self) -> int:
        """Tokens that the model can look back on."""
        return self.model.n_ctx

    @property
    def eot_token_id(self) -> int:
        """The end of a text; the beginning, where the vocabulary has no end."""
        ends = (self._vocabulary.eos_id, self._vocabulary.bos_id)
        return next((id for id in ends if id is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self._vocabulary.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.model.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Markers are tokens; the begin-of-text token is in front where the model asks for it and it is not there yet."""
        vocabulary = self._vocabulary
        ids = vocabulary.encode(string, special=True)
        wanted = vocabulary.adds_bos if add_special_tokens is None else add_special_tokens and vocabulary.adds_bos
        return [vocabulary.bos_id, *ids] if wanted and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Few-shot turns as the model's own template writes them; without `add_generation_prompt` the last one, in which a
        task begins the answer, is left open.
        """
        if add_generation_prompt:
            return self.model.template.render(chat_history)
        return Turns(chat_history, self.model.template, self._vocabulary).text()

    # ---- what it asks of the model

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Requests with the same beginning follow each other in one session, which computes it once."""
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), tuple(requests[i][1])))
        groups = [list(group) for _, group in groupby(order, key=lambda i: tuple(requests[i][1]))]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:

            def score(session: Any, group: list[int], _: Any) -> list[tuple[int, tuple[float, bool]]]:
                return [(i, scored(session.state, requests[i][1], requests[i][2])) for i in group]

            for group in spread(self._sessions, groups, score):
                for i, result in group:
                    found[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                bar.update(len(group))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows as long as the context."""
        windows: list[Request] = []
        ends = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        sums = [math.fsum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy unless `do_sample` is asked for."""
        found = [""] * len(requests)

        def complete(session: Any, i: int, cancel: Any) -> tuple[int, str]:
            context, wanted = requests[i].args
            options: Any = normalize_gen_kwargs(wanted, 256)
            n = options["max_gen_toks"]
            ids = self.tok_encode(context)[-max(1, self.max_length - n) :] or [self.prefix_token_id]
            given = {name: options[name] for name in SamplingOptions.__dataclass_fields__ if options.get(name) is not None}
            given["temperature"] = options.get("temperature", 1.0) if options.get("do_sample") else 0
            stop = [text for text in options["until"] if text]
            pieces = session.generate(ids, max_tokens=n, stop=stop, cancel=cancel, **{**PLAIN, **given})
            return i, "".join(piece.text for piece in pieces)

        with tqdm(total=len(requests), disable=disable_tqdm, desc="completions") as bar:
            for i, text in spread(self._sessions, range(len(requests)), complete):
                found[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update()
        return found


def scored(state: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """ln p(continuation | context), and whether every token of it is the likeliest one. `state`: a Session, whose cache
    keeps the context for the next one. What is too long for it loses its beginning.
    """
    if not continuation:
        return 0.0, True
    ids = [*context, *continuation][-(state.n_ctx + 1) :]
    start = len(ids) - len(continuation)

    def judge(logits: np.ndarray, first: int) -> list[tuple[float, bool]]:
        return [_judged(row, id) for row, id in zip(logits, ids[first:], strict=False)]

    claim = state.claim()
    with state.held(claim):
        found = list(state.advance(ids[:start], use=lambda row: judge(row[None], start))[0])
        while (at := start + len(found)) < len(ids):
            found += state.append(ids[at - 1], ids[at : len(ids) - 1], lambda rows, at=at: judge(rows, at))
    return math.fsum(logprob for logprob, _ in found), all(likeliest for _, likeliest in found)


def _judged(logits: np.ndarray, id: int) -> tuple[float, bool]:
    return -cross_entropy(logits.astype(np.float64)[None], np.array([id])), bool(logits.argmax() == id)


def main() -> None:
    """The harness's own command line, with this model among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
