"""Recognises the tensors of a checkpoint: by the names that code bases give them, and by what each code base means by these.

In: a `Checkpoint`. Out: a `CanonicalModel`. TOP_ROLES and LAYER_ROLES map common names to roles (`blk.0.attn_q.weight`). A row
of DIALECTS is recognised by a few names, and states what its code fixes and no tensor shows (rotary pairs, the form of GELU,
transposed matrices). assemble.py arranges the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import LazyTensor, bytes_each
from pocketlm.export.assemble import arrange, has_own_head, is_tied
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.checkpoint import Checkpoint, name_of, open_checkpoint
from pocketlm.export.dialect import Dialect, Draft, Tensors
from pocketlm.export.from_model_file import is_model_file, read_model_file
from pocketlm.export.home_made import HOME_MADE
from pocketlm.export.hugging_face import HUGGING_FACE, checked
from pocketlm.export.hugging_face_layer_norm import LAYER_NORM
from pocketlm.export.model_config import ModelConfig
from pocketlm.export.name_map import NameMap, read_name_map
from pocketlm.export.tokenizer_data import find_tokenizer
from pocketlm.runtime.model_summary import facts_of

# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

WRAPPER = r"(?:(?:model|transformer|gpt|gpt_neox|decoder|net|backbone|lm|llm|language_model)\.)*"
LAYERS = r"(?:layers?|blocks?|h|trf_blocks|transformer_blocks|decoder_layers|decoder_blocks)"
ATTENTION = r"(?:attn|attention|self_attn|self_attention|att|mha|sa|sa_heads|attn_layer)"
EMBED = r"(?:emb|embed|embedding|embeddings)"
NORM = r"(?:norm|ln|layernorm|layer_norm)"
FEED_FORWARD = r"(?:mlp|ffn|ff|ffwd|feed_forward|feedforward|feed_fwd)"

TOP_ROLES = {
    "token_embd": rf"wte|(?:tok|token|word)_?{EMBED}|{EMBED}|embed_tokens|embed_in|token_embedding_table",
    "position_embd": rf"wpe|(?:pos|position|positional)_{EMBED}|position_embedding_table|embed_positions",
    "output_norm": rf"ln_f|norm|norm_f|(?:final|output|out)_{NORM}|(?:norm|ln)_(?:final|out)",
    "output": r"lm_head|out_head|head|output|output_head|unembed|unembedding|to_logits|embed_out|out_proj|output_projection",
}
LAYER_ROLES = {
    "attn_norm": rf"(?:ln|norm)_?1|(?:pre_)?(?:attn|attention|att|sa|input)_?{NORM}|(?:ln|norm)_attn|{ATTENTION}\.{NORM}",
    "ffn_norm": rf"(?:ln|norm)_?2|(?:pre_)?(?:ffn|mlp|ff|feed_forward|ffwd|post_attention|post_attn)_?{NORM}"
    rf"|(?:ln|norm)_(?:mlp|ffn|ff)|{FEED_FORWARD}\.{NORM}",
    "attn_qkv": rf"(?:{ATTENTION}\.)?(?:c_attn|qkv|qkv_proj|Wqkv|wqkv|in_proj|to_qkv)",
    "attn_q": rf"(?:{ATTENTION}\.)?(?:q_proj|wq|W_q|w_q|Wq|W_query|query|q|to_q|q_linear)",
    "attn_k": rf"(?:{ATTENTION}\.)?(?:k_proj|wk|W_k|w_k|Wk|W_key|key|k|to_k|k_linear)",
    "attn_v": rf"(?:{ATTENTION}\.)?(?:v_proj|wv|W_v|w_v|Wv|W_value|value|v|to_v|v_linear)",
    "attn_output": rf"(?:{ATTENTION}\.)?(?:o_proj|out_proj|wo|W_o|w_o|Wo|o|to_out|W_out|o_linear)"
    rf"|{ATTENTION}\.(?:c_proj|proj|output|dense|out|output_proj|resid_proj)",
    "ffn_gate_up": rf"(?:{FEED_FORWARD}\.)?(?:gate_up_proj|w12|gate_up)",
    "ffn_gate": rf"(?:{FEED_FORWARD}\.)?(?:gate_proj|w_gate|gate|gate_linear|linear_gate|W_gate)",
    "ffn_up": rf"(?:{FEED_FORWARD}\.)?(?:up_proj|w_up|up|c_fc|fc_in|linear_up|W_up|linear_in|dense_h_to_4h)"
    rf"|(?:{FEED_FORWARD}\.)?(?:net|layers|seq)\.0|{FEED_FORWARD}\.(?:0|in_proj)",
    "ffn_down": rf"(?:{FEED_FORWARD}\.)?(?:down_proj|w_down|down|fc_out|linear_down|W_down|linear_out|dense_4h_to_h)"
    rf"|(?:{FEED_FORWARD}\.)?(?:net|layers|seq)\.2|{FEED_FORWARD}\.(?:c_proj|proj|2|out_proj)",
    "ffn_1": rf"(?:{FEED_FORWARD}\.)?(?:w1|fc1|W1|linear1|linear_1|fc_1|l1)",
    # what these are depends on their number and shapes
    "ffn_2": rf"(?:{FEED_FORWARD}\.)?(?:w2|fc2|W2|linear2|linear_2|fc_2|l2)",
    "ffn_3": rf"(?:{FEED_FORWARD}\.)?(?:w3|fc3|W3|linear3|linear_3|fc_3|l3)",
}
HEADS = rf"{ATTENTION}\.(?:heads\.)?(?P<head>\d+)\.(?P<part>query|key|value|q|k|v)"  # a module for each head
SUFFIXES = {**dict.fromkeys(("weight", "scale", "gamma", "g"), "weight"), **dict.fromkeys(("bias", "shift", "beta"), "bias")}
NOT_LEARNED = (  # buffers: masks and tables that the runtime makes itself
    r"(?:.*\.)?(?:attn|attention|self_attn)\.(?:bias|masked_bias)",  # only where they are no vector, see _is_buffer
    r"(?:.*\.)?(?:mask|causal_mask|attn_mask|attention_mask|tril|causal|_mask|bias_mask|masked_bias|position_ids|pos_ids|n_averaged)",
    r"(?:.*\.)?(?:inv_freq|original_inv_freq|freqs_cis|freqs_cos|freqs_sin)",
    r"(?:.*\.)?(?:cos_cached|sin_cached|rope_cos|rope_sin|cos_cache|sin_cache|rope_cache)",
    r"(?:.*\.)?(?:rope|rotary|rotary_emb|rotary_pos_emb)\.(?:cos|sin|cache|freqs)|cos|sin|(?:.*\.)?(?:cos|sin)",
    r"(?:.*\.)?(?:alibi|slopes|alibi_slopes|alibi_bias)",
)
EYES = r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..+"  # what Gemma 3 sees pictures with


# the matrix that is changed, which factor of the change: of textbooks, MLX, and a model that PEFT has wrapped
LORA = r"(.+)\.lora(?:\.|_|\.lora_|_embedding_)([ABab])(?:(?:\.\w+)?\.weight)?"


def _table(roles: Mapping[str, str], prefix: str) -> list[tuple[str, re.Pattern[str]]]:
    suffix = rf"(?:\.(?P<suffix>{'|'.join(SUFFIXES)}))?"
    return [(role, re.compile(rf"{prefix}(?:{names}){suffix}")) for role, names in roles.items()]


@lru_cache(maxsize=1)
def _spellings() -> list[tuple[str, re.Pattern[str]]]:
    """(role, expression) in order."""
    layer = _table({**LAYER_ROLES, "head": HEADS}, rf"{WRAPPER}{LAYERS}\.(?P<layer>\d+)\.")
    return layer + _table(TOP_ROLES, WRAPPER)


def role_of(name: str) -> str | None:
    """A tensor's role by its name alone: "blk.3.attn_q.weight", "token_embd.weight"; None if no spelling fits.

    A head that is a tensor of its own is "blk.3.attn_q.weight#2".
    """
    if len(name) > 512:
        return None
    for role, expression in _spellings():
        if match := expression.fullmatch(name):
            groups = match.groupdict()
            end = SUFFIXES[groups.get("suffix") or "weight"]
            if role == "head":
                return f"blk.{int(groups['layer'])}.attn_{groups['part'][0]}.{end}#{int(groups['head'])}"
            layer = f"blk.{int(groups['layer'])}." if groups.get("layer") else ""
            return f"{layer}{role}.{end}"
    return None


# ── dialects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_conv1d(tensors: Tensors) -> bool:
    return any(
        name.endswith("attn.c_attn.weight") and t.shape[-1] > t.shape[0] for name, t in tensors.items() if len(t.shape) == 2
    )


BUILD_NANOGPT = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}


def _finish_nanogpt(draft: Draft) -> None:
    """build-nanogpt computes GELU by the tanh formula. It is recognised by what it saves beside the weights."""
    said = draft.config.said
    sizes, activation = said("config"), draft.config.get("activation")
    if activation is None and isinstance(sizes, dict) and sizes.keys() == BUILD_NANOGPT and said("step") is not None:
        draft.options["activation"] = "gelu_tanh"


LLAMA3_HEADER = "<|start_header_id|>"
LLAMA3_TEMPLATE = (  # what Meta's code makes of a conversation
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
META = "Meta Llama"
_GPT2 = (r"(.*\.)?wte\.weight", r"(.*\.)?h\.N\.attn\.c_attn\.weight")
DIALECTS = (
    *HOME_MADE,
    *LAYER_NORM,
    Dialect(
        "llm.c", (r"h\.N\.fcproj\.weight",), {"norm": "layer", "activation": "gelu_tanh", "norm_eps": 1e-5},
        names={"*.attproj": "attn_output", "*.fc": "ffn_up", "*.fcproj": "ffn_down", "lnf": "output_norm"},
    ),
    Dialect("Hugging Face GPT-2", _GPT2, {"norm": "layer", "activation": "gelu_tanh", "norm_eps": 1e-5}, True, _is_conv1d),
    Dialect(
        "minGPT", (*_GPT2, r"(.*\.)?h\.N\.attn\.bias", r"(.*\.)?lm_head\.weight"),
        {"norm": "layer", "activation": "gelu_tanh", "norm_eps": 1e-5}, test=has_own_head,
    ),
    Dialect("nanoGPT", _GPT2, {"norm": "layer", "activation": "gelu_erf", "norm_eps": 1e-5}, finish=_finish_nanogpt),
    Dialect(
        "from-scratch GPT",
        (r"tok_emb\.weight", r"pos_emb\.weight", r"trf_blocks\.N\.att\.W_query\.weight", r"trf_blocks\.N\.norm1\.scale"),
        {"norm": "layer", "activation": "gelu_tanh", "norm_eps": 1e-5},
    ),
    Dialect(
        META,
        (r"(.*\.)?tok_embeddings\.weight", r"(.*\.)?layers\.N\.attention\.wq\.weight",
        r"(.*\.)?layers\.N\.feed_forward\.w1\.weight"),
        {"norm": "rms", "position": "rope", "rope_pairs": "interleaved", "rope_theta": 10000.0, "norm_eps": 1e-5},
        computes=("use_scaled_rope",),
    ),
    Dialect(
        "Hugging Face Llama",
        (r"(.*\.)?layers\.N\.self_attn\.[qv]\w*_proj\.weight", r"(.*\.)?layers\.N\.post_attention_layernorm\.weight"),
        {"norm": "rms", "rope_pairs": "half"},
    ),
    Dialect(
        "pocketlm's trainer",
        (r"tok_emb\.weight", r"layers\.N\.attn_norm\.weight", r"layers\.N\.attn\.q_proj\.weight", r"out_norm\.weight"),
        {"rope_pairs": "half"},
    ),
    Dialect("decoder with usual names", ()),
)  # fmt: skip


GUESSED = (
    "its code base is known by no sign: norms were taken to stand before attention and feed-forward, scores to be divided by "
    "√head_dim, embeddings to be used as they are; compare an answer with --temp 0 with your own program's"
)


def recognise(tensors: Tensors) -> Dialect:
    """The first row whose signs all match and whose test holds."""
    names = "\n".join(tensors)
    for dialect in DIALECTS:
        signs = (re.compile(rf"^{sign.replace('N', '[0-9]+')}$", re.MULTILINE) for sign in dialect.signs)
        if all(sign.search(names) for sign in signs) and dialect.test(tensors):
            return dialect
    raise AssertionError("the last row has no signs")


def not_parameters(tensors: Tensors) -> frozenset[str]:
    """Names of a checkpoint's tensors that no export counts: buffers, an output matrix that is the token table, and eyes."""
    own = dict(zip(_bare(tensors), tensors, strict=True))
    others = {own[name] for name in own if _is_buffer(name, tensors[own[name]]) or re.fullmatch(EYES, name)}
    names = {role_of(name): own[name] for name in own}
    head, table = names.get("output.weight"), names.get("token_embd.weight")
    if head and table and is_tied(tensors[head], tensors[table]):
        others.add(head)
    return frozenset(others)


def _is_buffer(name: str, tensor: LazyTensor) -> bool:
    if name.endswith(("attn.bias", "attention.bias")):
        return len(tensor.shape) != 1
    return any(re.fullmatch(expression, name) for expression in NOT_LEARNED)


QUANTISED = {  # programs that quantise weights, by tensors that they add
    "bitsandbytes": r"\.(quant_state\.bitsandbytes__\w+|SCB)$",
    "mlx": r"\.biases$",
    "gptq or awq": r"\.qzeros$",
    "scales apart": r"\.weight_(packed|scale\w*)$",
}


def _quantised(path: Path, left_over: list[str], config: ModelConfig, dialect: Dialect) -> FileError | None:
    """What to say of quantised weights: those of which a configuration says so, or which have tensors without a place."""
    said, text = config.raw("quantization_config"), "\n".join(left_over)
    found = next((name for name, sign in QUANTISED.items() if re.search(sign, text, re.MULTILINE)), None)
    if not found and not (isinstance(said, dict) and said and (left_over or "quantization_config" not in dialect.computes)):
        return None
    method = (said.get("quant_method") if isinstance(said, dict) else None) or found or "by some method"
    advice = "export the checkpoint that it was made of" + ", or what mlx_lm.convert -d makes of it" * (method == "mlx")
    if not left_over:
        advice += "; if they are plain numbers, take quantization_config out of config.json"
    return FileError(path, f"its weights are quantised ({quoted(method)})", advice)


def _bare(tensors: Tensors) -> dict[str, LazyTensor]:
    """The tensors without the attributes that a training class keeps the model in ("student."), where these hide every name."""
    bare = dict(tensors)
    while not any(map(role_of, bare)):
        if len({name.partition(".")[0] for name in bare}) != 1 or not all("." in name for name in bare):
            return dict(tensors)
        bare = {name.partition(".")[2]: tensor for name, tensor in bare.items()}
    return bare


# ── the way to a canonical model ─────────────────────────────────────────────────────────────────────────────────────


def to_canonical(
    checkpoint: Checkpoint, *, overrides: Mapping[str, str] | None = None, mapping: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> CanonicalModel:  # fmt: skip
    """The canonical form of a checkpoint, tokenizer included where one is found beside it or given.

    `overrides`: the settings of `--set`; `mapping`: a file of names (name_map.py); `tokenizer`: a tokenizer's file or folder.
    Raises FileError that lists the tensors that are missing, left over or misshapen, or the settings that nothing tells.
    """
    names = read_name_map(Path(mapping)) if mapping else NameMap()
    path = checkpoint.path
    given = {**names.settings, **(overrides or {})}
    if not mapping:
        checkpoint = replace(checkpoint, tensors=_bare(checkpoint.tensors))
    known = recognise(checkpoint.tensors)
    family = HUGGING_FACE.get(ModelConfig(checkpoint.config, given, path).model_type or "")
    if known.name.startswith((META, "litGPT")):  # they may lie beside transformers' configuration, with rows in another order
        family = None
    dialect = family or known
    found: dict[str, LazyTensor] = {}
    buffers: dict[str, LazyTensor] = {}
    left_over: list[str] = []
    seeing = {name for name in checkpoint.tensors if family and re.fullmatch(EYES, name)}
    for name, tensor in checkpoint.tensors.items():
        if name in seeing:
            continue
        role = names.role_of(name) or dialect.role_of(name)
        if role is None and (names.drops(name) or _is_buffer(name, tensor)):
            buffers[name] = tensor
            continue
        role = role or role_of(name)
        if role is None or role in found:
            left_over.append(name)
        else:
            found[role] = tensor
    loras = [name for name in left_over if re.fullmatch(LORA, name)]
    if loras and len(loras) == len(checkpoint.tensors):
        raise FileError(path, "is a LoRA alone", f"export the model it was trained on, with --lora {path}")
    if loras:
        raise FileError(path, "holds a LoRA that is not merged", f"merge it with --lora {path} --lora-scale ALPHA")
    if left_over and checkpoint.sets:
        names_of_sets = ", ".join(map(quoted, checkpoint.sets))
        raise FileError(path, f"has several sets of weights: {names_of_sets}", "choose one with --set weights=NAME")
    if error := _quantised(path, left_over, ModelConfig(checkpoint.config, given, path), dialect):
        raise error
    if left_over:
        more = f" and {len(left_over) - 3} more" if len(left_over) > 3 else ""
        listed = ", ".join(map(quoted, left_over[:3])) + more
        problem = f"{len(left_over)} of {len(checkpoint.tensors)} tensors have no place in the model: {listed}"
        cure = "name them in a file for --map (pocketlm inspect --tensors lists all), or the model computes something else"
        raise FileError(path, problem, cure)
    for role, tensor in found.items():
        if "int" in tensor.dtype and not role.endswith(("_blocks.weight", "_scales.weight")):  # those of MXFP4
            problem = f"{quoted(tensor.name)} holds whole numbers ({tensor.dtype}), so the weights are quantised"
            raise FileError(path, problem, "export the checkpoint that it was made of")
    said = {**checkpoint.config, "guessed from shapes": dialect.guess(checkpoint.tensors)}
    config = ModelConfig(said, given, path)
    model = arrange(path, found, buffers, config, dialect)
    if dialect is DIALECTS[-1]:
        model.notes.append(GUESSED)
    if seeing:
        model.notes.append(f"it sees no pictures: {len(seeing)} tensors of its vision tower are left out")
    if family:
        model = checked(model, config, family.fixed)
    if checkpoint.sets:
        taken, *others = map(quoted, checkpoint.sets)
        model.notes.append(f"these are the weights called {taken}; --set weights={others[0]} takes others")
    metadata, notes = find_tokenizer(checkpoint, model.hyper.n_vocab, tokenizer)
    name, template = name_of(path), dialect.template
    if dialect.name == META and "instruct" in name.lower() and LLAMA3_HEADER in metadata.get("tokenizer.ggml.tokens", ()):
        template = LLAMA3_TEMPLATE
        notes.append(f"its chat template is that of Llama 3, as it is called {quoted(name)}")
    if template and metadata:
        metadata = {"tokenizer.chat_template": template, **metadata}
    return replace(model, metadata={"general.name": name, **metadata}, notes=[*model.notes, *notes])


def read_canonical(
    path: str | Path, *, overrides: Mapping[str, str] | None = None, mapping: str | Path | None = None,
    tokenizer: str | Path | None = None, change: Callable[[Checkpoint], Checkpoint] | None = None,
) -> CanonicalModel:  # fmt: skip
    """The canonical form of anything that holds a model: a checkpoint, a GGUF file, the folder of an fp16 bin.

    `change` is applied to the tensors first (a LoRA).
    """
    path = Path(path)
    if is_model_file(path):
        return read_model_file(path, change)
    checkpoint = open_checkpoint(path, (overrides or {}).get("weights", ""))
    if change:
        checkpoint = change(checkpoint)
    model = to_canonical(checkpoint, overrides=overrides, mapping=mapping, tokenizer=tokenizer)
    if not change and path.is_dir() and (path / "adapter_config.json").is_file():
        model.notes.append(f"the LoRA that lies in {path} is not in it; --lora {path} merges it")
    return model


def inspect_checkpoint(path: Path, tensors: bool = False) -> dict[str, Any]:
    """What is in a checkpoint, as the plain facts that runtime/model_summary.py gives of a model; its configuration as the
    metadata. Raises FileError for what cannot be read safely.
    """
    checkpoint = open_checkpoint(path)
    rows = [
        {"name": name, "shape": list(t.shape), "format": t.dtype, "bytes": math.prod(t.shape) * bytes_each(t.dtype)}
        for name, t in checkpoint.tensors.items()
    ]
    n_bytes = sum(file.stat().st_size for file in checkpoint.files)
    others = not_parameters(checkpoint.tensors)
    return facts_of(path, "checkpoint", n_bytes, rows, others, checkpoint.config, tensors)
