"""What is said about an answer, in the shapes of OpenAI's protocol.

In: pieces. Out: the objects of a response or of its stream. Knows no HTTP.
"""

from __future__ import annotations

import math
import secrets
import time
from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pocketlm import __version__

if TYPE_CHECKING:
    from pocketlm.chat.thinking import Splitter
    from pocketlm.runtime.generator import Piece
    from pocketlm.serve.fields import Ask

BREAKS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
NEVER = -9999.0  # what the protocol calls the logarithm of no probability
FINGERPRINT = f"b-pocketlm-{__version__}"


def one_line(json: str) -> bytes:
    """JSON without the ends of lines that Unicode has beside those that JSON escapes: httpx's `iter_lines`, Node's `readline`
    and `str.splitlines` would cut it there.
    """
    return (json if json.isascii() else json.translate(BREAKS)).encode()


def finish_reason(piece: Piece) -> str | None:
    """In the protocol's words, where an answer that was ended by the time limit has reached a "length", too."""
    return "length" if piece.finish_reason == "cancelled" else piece.finish_reason


class Shape:
    """The objects about one request. `token_bytes` gives the bytes that an id stands for."""

    each_token = False  # whether a token without text is something to say
    done = b"data: [DONE]\n\n"  # the end of a stream

    def __init__(self, ask: Ask, model: str, token_bytes: Callable[[int], bytes]):
        self._ask, self._is_chat, self._token_bytes = ask, ask.is_chat, token_bytes
        self._head = {"id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{secrets.token_hex(16)}", "created": int(time.time()),
                      "model": model, "system_fingerprint": FINGERPRINT}  # fmt: skip
        # for logprobs, of each completion: its characters so far, and the beginning of one that is not whole yet
        self._offsets: defaultdict[int, tuple[int, Any]] = defaultdict(lambda: (0, getincrementaldecoder("utf-8")("replace")))

    def opening(self, number: int) -> dict[str, Any] | None:
        """What a stream sends before the first text of an answer; None: nothing."""
        return self._chunk(number, {"role": "assistant", "content": None}, None) if self._is_chat else None

    def delta(self, number: int, text: str, pieces: Sequence[Piece], is_thought: bool = False) -> dict[str, Any]:
        """More text, and the pieces that it comes from."""
        logprobs = self._logprobs(number, pieces) if self._ask.logprobs else None
        return self._chunk(number, {"reasoning_content" if is_thought else "content": text}, None, logprobs)

    def end(self, number: int, piece: Piece, dropped_turns: int) -> dict[str, Any]:
        """The end of an answer in a stream."""
        told = {"note": piece.note} if piece.note else {}
        told |= {"dropped_turns": dropped_turns} if dropped_turns else {}
        return {**self._chunk(number, {}, finish_reason(piece)), "timings": timings(piece), **told}

    def usage(self, lasts: Sequence[Piece]) -> dict[str, Any]:
        """The last object of a stream, if the request asks for it."""
        return {**self._head, "object": self._name(".chunk"), "choices": [], "usage": usage(lasts, self._ask.n),
                "timings": timings(lasts[-1])}  # fmt: skip

    def whole(
        self, answers: Sequence[Sequence[Piece]], dropped_turns: int, parts: Callable[[], Splitter] | None = None
    ) -> Any:  # fmt: skip
        """The response that is no stream. `answers`: the pieces of each; `parts`: makes what splits a text into thought, which
        becomes `reasoning_content`, and answer.
        """
        choices = []
        for number, pieces in enumerate(answers):
            text, told = "".join(piece.text for piece in pieces), {}
            if parts is not None:
                thought, text = parts().whole(text)
                told = {"reasoning_content": thought} if thought else {}
            message = {"role": "assistant", "content": text, **told}
            content: dict[str, Any] = {"message": message} if self._is_chat else {"text": text}
            logprobs = self._logprobs(number, pieces) if self._ask.logprobs else None
            choices.append({"index": number, **content, "logprobs": logprobs, "finish_reason": finish_reason(pieces[-1])})
        lasts = [pieces[-1] for pieces in answers]
        told = {"dropped_turns": dropped_turns} if dropped_turns else {}
        return {**self._head, "object": self._name(""), "choices": choices, "usage": usage(lasts, self._ask.n),
                "timings": timings(lasts[-1]), **told}  # fmt: skip

    def _name(self, ending: str) -> str:
        return f"chat.completion{ending}" if self._is_chat else "text_completion"

    def _chunk(self, number: int, delta: dict[str, Any], reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content") or ""}
        choice = {"index": number, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self._name(".chunk"), "choices": [choice]}

    def _logprobs(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        if self._is_chat:
            return {"content": self._probabilities(pieces), "refusal": None}
        tokens = [piece for piece in pieces if piece.id >= 0]
        offsets, (at, decoder) = [], self._offsets[number]
        for piece in tokens:
            offsets.append(at)
            at += len(decoder.decode(self._token_bytes(piece.id)))
        self._offsets[number] = at, decoder
        tops = [{self._key(id): _finite(logprob) for id, logprob in piece.top_logprobs} for piece in tokens]
        return {"tokens": [self._key(piece.id) for piece in tokens],
                "token_logprobs": [_finite(piece.logprob) for piece in tokens], "top_logprobs": tops,
                "text_offset": offsets}  # fmt: skip

    def _probabilities(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [{**self._token(piece.id, piece.logprob), "top_logprobs": [self._token(*pair) for pair in piece.top_logprobs]}
                for piece in pieces if piece.id >= 0]  # fmt: skip

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {"id": id, "token": self._text(id), "bytes": [*self._token_bytes(id)], "logprob": _finite(logprob)}

    def _key(self, id: int) -> str:
        """A token as a key of `top_logprobs`: its text, or, if it is part of a character, its bytes as OpenAI spells them."""
        data = self._token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _text(self, id: int) -> str:
        return self._token_bytes(id).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else NEVER


def usage(lasts: Sequence[Piece], n: int) -> dict[str, Any]:
    """Counts of tokens; the prompt of `n` answers counts once."""
    prompt, completion = sum(piece.prompt_tokens for piece in lasts[::n]), sum(piece.generated_tokens for piece in lasts)
    cached = sum(piece.cached_tokens for piece in lasts[::n])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def timings(last: Piece) -> dict[str, Any]:
    """In milliseconds, with the names of llama.cpp's server. The time to the first token is the prompt's, since its logits are
    computed with it; it is no part of the speed of the tokens that follow.
    """
    told: dict[str, Any] = {"cache_n": last.cached_tokens}
    n_read = last.prompt_tokens - last.cached_tokens
    reading = n_read / last.prompt_seconds if n_read > 0 and last.prompt_seconds > 0 else 0.0
    parts = {
        "prompt": (n_read, last.prompt_seconds, reading),
        "predicted": (last.generated_tokens, last.generation_seconds, last.tokens_per_second),
    }
    for name, (n, seconds, speed) in parts.items():
        told |= {f"{name}_n": n, f"{name}_ms": 1e3 * seconds, f"{name}_per_second": speed,
                 f"{name}_per_token_ms": 1e3 / speed if speed else 0.0}  # fmt: skip
    return told
