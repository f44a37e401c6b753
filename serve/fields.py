"""The fields of a request: which there are, what they may hold, and what they ask of the model.

In: the JSON of `/v1/chat/completions`, `/v1/completions` or llama.cpp's `/completion`. Out: an `Ask`, or an ApiError 400 that
names the field. A field that is not supported is refused, never ignored; one that is null counts as not given. Knows no model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketlm.constrain import OPTIONS
from pocketlm.errors import UsageError, did_you_mean, quoted
from pocketlm.runtime.sampling_options import SamplingOptions
from pocketlm.serve.errors import ApiError

MOST_BRACKETS = 200_000  # of 1.4 million empty lists, in 4 MB, nobody else was answered for a second
MOST_CHOICES = 16  # answers to one request: prompts times n
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 4096
MOST_LIKELIEST = 20  # OpenAI's bound of top_logprobs
COMPLETION_TOKENS = 16  # what OpenAI's protocol says of max_tokens in /v1/completions where it is not given
ALMOST_NONE = 1e-6  # top_p 0, which OpenAI's protocol allows, is the likeliest token alone
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty",
)  # fmt: skip

# Fields of the protocol that cannot be had, with the values that ask for nothing
NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "store": (False,),
    "service_tier": ("auto", "default"), "echo": (False,), "suffix": ("",), "best_of": (1,), "grammar": ("",), "n_probs": (0,),
    # … and llama.cpp's
    **dict.fromkeys(("dynatemp_range", "dry_multiplier", "xtc_probability", "mirostat", "min_keep", "n_indent"), (0, 0.0)),
    **dict.fromkeys(("t_max_predict_ms", "n_cache_reuse"), (0,)), "typical_p": (1, 1.0), "top_n_sigma": (-1, -1.0),
    "lora": ([],), "response_fields": ([],), "add_generation_prompt": (True,),
    **dict.fromkeys(("post_sampling_probs", "timings_per_token", "return_progress", "verbose"), (False,)),
}  # fmt: skip
NO_TOOLS: dict[str, str] = dict.fromkeys(
    ("tools", "tool_choice", "functions", "function_call"), ": there are no tools here; response_format gives an answer a form"
)
OF_FORM = ("response_format", "json_schema")
UNHEEDED = {  # they change no answer: labels for who keeps books, …
    "user", "metadata", "safety_identifier", "prompt_cache_key",
    # … and llama.cpp's: of samplers that are off, of a context that is never shifted, which slot; each gives the same answer
    "dynatemp_exponent", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold",
    "mirostat_tau", "mirostat_eta", "n_keep", "n_discard", "id_slot",
}  # fmt: skip


@dataclass
class Ask:
    """What one request wants. `options` are those of `Conversation.generate`."""

    is_chat: bool
    llama_cpp: bool = False  # in llama.cpp's words: its prompts may hold control tokens, as the text of a conversation does
    messages: list[dict[str, str]] = field(default_factory=list)
    prompts: list[str | list[int | str]] = field(default_factory=list)
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    fit: bool = False
    thinking: bool | None = None  # None: as the template does
    thoughts_apart: bool = True
    return_tokens: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def parse(data: bytes, what: str = "the body") -> dict[str, Any]:
    """The JSON object that a request is. Raises ApiError for anything else; `what` it calls the data."""
    if data.count(b"[") + data.count(b"{") > MOST_BRACKETS:  # more than the text of any context has
        raise ApiError(400, f"{what} has more than {MOST_BRACKETS:,} opening brackets")
    try:
        text = data.decode()  # json.loads would let half characters in
        content = json.loads(text, object_pairs_hook=_object)
        if "\\u" in text:  # JSON can spell half a character, which is no text: a UnicodeEncodeError
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, "this is no JSON in UTF-8") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"{what} is no JSON object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ApiError for a repeated name: one of the values would be lost silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise _bad(quoted(name), "stands twice in the same object")
    return found


def read(body: dict[str, Any], is_chat: bool, defaults: Mapping[str, Any], llama_cpp: bool = False) -> Ask:
    """The parsed request; `defaults`: options that it leaves out. Raises ApiError."""
    fields = _CHAT if is_chat else _LLAMA_CPP if llama_cpp else _COMPLETION
    ask, defaults, given = Ask(is_chat, llama_cpp), {**defaults}, dict[str, tuple[str, Any]]()
    if any(body.get(name) is not None for name in OF_FORM):  # in place of the form of the defaults, not beside it
        defaults = {name: value for name, value in defaults.items() if name not in OPTIONS}
    if not (is_chat or llama_cpp):
        defaults.setdefault("max_tokens", COMPLETION_TOKENS)
    for name, value in body.items():
        if value is None or name in UNHEEDED:
            continue
        if name in fields:
            ask.options = {}
            fields[name](ask, name, value)
            for option, wanted in ask.options.items():
                first, before = given.setdefault(option, (name, wanted))
                if first != name and before != wanted:
                    raise _bad(name, f"and {first} ask for different things; give one of them")
        elif name not in NOTHING or not any(value == nothing and type(value) is type(nothing) for nothing in NOTHING[name]):
            hint = NO_TOOLS.get(name, "") if name in NOTHING else did_you_mean(name[:40], fields, cutoff=0.7)
            if name in _AT:
                hint = f" here; it is a field of {_AT[name]}"
            raise _bad(name[:100], f"is not supported{hint}")
    ask.options = {**defaults, **{option: wanted for option, (_, wanted) in given.items()}}
    if not (ask.messages if is_chat else ask.prompts):
        raise _bad("messages" if is_chat else "prompt", "is missing")
    if len(ask.prompts or [0]) * ask.n > MOST_CHOICES:
        raise _bad("n", f"asks for more than {MOST_CHOICES} answers at once")
    if is_chat and ask.options.get("top_logprobs") and not ask.logprobs:
        raise _bad("top_logprobs", "needs logprobs: true")
    try:
        SamplingOptions(**{name: ask.options[name] for name in (*SAMPLING, "seed", "logit_bias") if name in ask.options})
    except UsageError as error:
        raise ApiError(400, str(error)) from None
    return ask


def _bad(name: str, problem: str) -> ApiError:
    return ApiError(400, f"{name} {problem}", param=name)


# ---- kinds of fields -----------------------------------------------------------------------------------------------------

Reader = Callable[[Ask, str, Any], None]


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _bad(name, f"must be a whole number from {least} to {most}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad(name, "must be true or false")
    return value


def _number(ask: Ask, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(name, "must be a number")
    ask.options[name] = value


def _model(ask: Ask, name: str, value: Any) -> None:
    if not isinstance(value, str):  # any name means the model that is here
        raise _bad(name, "must be a text")


def _set(name: str, read: Callable[[str, Any], Any]) -> Reader:
    return lambda ask, given, value: setattr(ask, name, read(given, value))


def _option(name: str, read: Callable[[str, Any], Any]) -> Reader:
    return lambda ask, given, value: ask.options.__setitem__(name, read(given, value))


def _seed(name: str, value: Any) -> int | None:
    return None if value == -1 else _whole(name, value, 0, 1 << 64)  # -1: llama.cpp's word for any


def _stop(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _bad(name, "must be a text or a list of texts, each of at least one character")
    if len(stops) > MOST_STOPS or sum(map(len, stops)) > MOST_STOP_CHARACTERS:
        raise _bad(name, f"holds more than {MOST_STOPS} texts, or more than {MOST_STOP_CHARACTERS} characters")
    return stops


def _logit_bias(name: str, value: Any, with_texts: bool = False) -> dict[Any, float]:
    """OpenAI's object of ids and numbers, or llama.cpp's list of pairs, where false means never. `with_texts`: a key that is no
    number is a text, and stands for all of its tokens.
    """
    pairs = list(value.items()) if isinstance(value, dict) else value
    bias = {}
    try:
        for id, number in pairs:
            number = -math.inf if number is False else number
            if isinstance(number, bool) or not isinstance(number, int | float) or isinstance(id, float):
                raise ValueError
            is_text = with_texts and isinstance(id, str) and not id.lstrip("-").isdecimal()
            bias[id if is_text else int(id)] = float(number)
    except (TypeError, ValueError, OverflowError):
        raise _bad(name, "must map ids of tokens to numbers") from None
    return bias


def _given(value: Any) -> Any:
    """An object without the entries that are null; other values unchanged."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _stream_options(ask: Ask, name: str, value: Any) -> None:
    value = _given(value)
    if not isinstance(value, dict) or not {*value} <= {"include_usage", "include_obfuscation"}:
        raise _bad(name, "may hold include_usage and nothing else")
    if value.get("include_obfuscation"):
        raise _bad(f"{name}.include_obfuscation", "is not supported")
    ask.include_usage = _flag(f"{name}.include_usage", value.get("include_usage", False))


_FORMATS = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema",)}


def _response_format(ask: Ask, name: str, value: Any) -> None:
    """OpenAI's three formats; like llama.cpp, json_object may have a `schema`."""
    value = _given(value)
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise _bad(f"{name}.type", f"must be one of {', '.join(_FORMATS)}")
    known = {"type", *_FORMATS[kind]}
    if kind == "json_schema":
        name, value, known = f"{name}.{kind}", _given(value.get(kind)), {"name", "description", "strict", "schema"}
        if not isinstance(value, dict) or value.get("schema") is None:
            raise _bad(f"{name}.schema", "is missing")
    if unknown := [other for other in value if other not in known]:
        raise _bad(f"{name}.{unknown[0][:100]}", "is not supported")
    if value.get("schema") is not None:
        ask.options["json_schema"] = value["schema"]
    elif kind == "json_object":
        ask.options["json_object"] = True


def _messages(ask: Ask, name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise _bad(name, "must be a list of at least one message")
    ask.messages = [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]
    names = {(ROLES[message["role"]], given) for message in value if (given := message.get("name"))}
    if len(names) > len({role for role, _ in names}):  # templates tell a model the roles
        raise _bad(name, "has two names for one role, and models are told roles only")


def _message(name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _bad(name, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(f"{name}.role", f"must be one of {', '.join(ROLES)}")
    thought = message.get("reasoning_content") if role == "assistant" else None
    for other, given in message.items():
        if isinstance(given, str) and (other == "name" or given is thought):
            continue
        if other not in ("role", "content") and given not in (None, []):
            raise _bad(f"{name}.{other[:100]}", "is not supported")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise _bad(f"{name}.content", "must be a text, or a list of parts of type text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _bad(f"{name}.content", "must be a text")
    return {"role": ROLES[role], "content": f"<think>\n{thought}\n</think>\n\n{content}" if thought else content}


def _template_arguments(ask: Ask, name: str, value: Any) -> None:
    """Of llama.cpp's template arguments, the one that means something here."""
    value = _given(value)
    if not isinstance(value, dict) or not {*value} <= {"enable_thinking"}:
        raise _bad(name, "may hold enable_thinking and nothing else")
    if "enable_thinking" in value:
        ask.thinking = _flag(f"{name}.enable_thinking", value["enable_thinking"])


def _reasoning_format(ask: Ask, name: str, value: Any) -> None:
    if value not in ("auto", "deepseek", "none"):
        raise _bad(name, "must be auto or none")
    ask.thoughts_apart = value != "none"


def _prompt(ask: Ask, name: str, value: Any) -> None:
    """A text, ids, ids with texts among them, or several of these."""
    if not isinstance(value, list) or any(type(part) is int for part in value):
        value = [value]
    value = [each["prompt_string"] if isinstance(each, dict) and [*each] == ["prompt_string"] else each for each in value]
    if not all(isinstance(each, str) or _is_ids(each) for each in value):
        raise _bad(name, "must be a text, a list of texts, ids of tokens, or a list of such")
    if not 1 <= len(value) <= MOST_CHOICES:
        raise _bad(name, f"must hold 1 to {MOST_CHOICES} prompts")
    ask.prompts = value


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list) or not any(type(part) is int for part in value):
        return False
    return all(isinstance(part, str) or (type(part) is int and 0 <= part < 1 << 31) for part in value)


def _logprobs_of_completion(ask: Ask, name: str, value: Any) -> None:
    if value is not False:
        ask.logprobs = True
        ask.options["top_logprobs"] = 1 if value is True else _whole(name, value, 0, MOST_LIKELIEST)


def _max_tokens(name: str, value: Any) -> int | None:
    return None if value == -1 else _whole(name, value, 0, 1 << 31)  # -1: as many as there is room for


_COMMON: dict[str, Reader] = {
    **dict.fromkeys(SAMPLING, _number),
    "top_p": lambda ask, name, value: _number(ask, name, ALMOST_NONE if value == 0 and value is not False else value),
    "model": _model,
    **dict.fromkeys(("max_tokens", "n_predict"), _option("max_tokens", _max_tokens)),  # the second is llama.cpp's word
    "seed": _option("seed", _seed),
    "stop": _option("stop", _stop),
    "logit_bias": _option("logit_bias", _logit_bias),
    "ignore_eos": _option("ignore_eos", _flag),
    "cache_prompt": _option("reuse_cache", _flag),
    "n": _set("n", lambda name, value: _whole(name, value, 1, MOST_CHOICES)),
    "stream": _set("stream", _flag),
    "response_format": _response_format,
    "json_schema": lambda ask, name, value: ask.options.__setitem__(name, value),
    "stream_options": _stream_options,
}
_CHAT: dict[str, Reader] = {
    **_COMMON,
    "messages": _messages,
    "chat_template_kwargs": _template_arguments,
    "reasoning_format": _reasoning_format,
    "max_completion_tokens": _option("max_tokens", _max_tokens),
    "logprobs": _set("logprobs", _flag),
    "top_logprobs": _option("top_logprobs", lambda name, value: _whole(name, value, 0, MOST_LIKELIEST)),
    # ours: whole turns go where the context is full, oldest first, and characters that the model does not know are left out
    "fit": _set("fit", _flag),
}
_AT = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}  # where those belong that are at the wrong address
_COMPLETION: dict[str, Reader] = {**_COMMON, "prompt": _prompt, "logprobs": _logprobs_of_completion}
_LLAMA_CPP: dict[str, Reader] = {
    **{name: reader for name, reader in _COMMON.items() if name != "stream_options"},
    "prompt": _prompt,
    "n_probs": lambda ask, name, value: None if value == 0 else _logprobs_of_completion(ask, name, value),
    "logit_bias": _option("logit_bias", lambda name, value: _logit_bias(name, value, with_texts=True)),
    "return_tokens": _set("return_tokens", _flag),
}
