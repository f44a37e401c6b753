"""Hyper-parameters and tensors that make no sense are one line within a second; the plan is what the architecture says."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import ARCHITECTURES as TINY
from tiny_models import TOKENS, write_model

from pocketlm.errors import FileError
from pocketlm.runtime import operations as P
from pocketlm.runtime.architectures import common
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.metadata_keys import Keys
from pocketlm.runtime.plan import Plan, make_plan

ABSURD: list[Any] = [0, -1, 1 << 40, 1.5, math.nan, "eight", True, [1, 2], ["a"], [4.0, 4.0], [0, 0]]
COUNTS = [
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
]  # fmt: skip
NUMBERS: list[Any] = [-1.0, math.nan, math.inf, -math.inf, "small", True, [1.0], ["a"], 1e30]


def plan_of(path) -> Plan:
    with open_gguf(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        return make_plan(read_hyper(file.metadata, shapes["token_embd.weight"][0], path), shapes, path)


def complaint(path) -> str:
    """The one line about a file, which takes less than a second of the processor."""
    started = time.process_time()
    with pytest.raises(FileError) as raised:
        plan_of(path)
    assert time.process_time() - started < 1
    text = str(raised.value)
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 1000
    return text


@pytest.mark.parametrize("value", ABSURD, ids=repr)
@pytest.mark.parametrize("key", COUNTS)
def test_an_absurd_count_is_named(tmp_path, key, value):
    path = write_model(tmp_path / "model.gguf", n_layer=1, metadata={f"llama.{key}": value})
    assert f"llama.{key}" in complaint(path)


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"])
def test_an_absurd_number_is_named(tmp_path, key, value):
    path = write_model(tmp_path / "model.gguf", n_layer=1, metadata={f"llama.{key}": value})
    assert f"llama.{key}" in complaint(path)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, math.nan], ids=["huge", "small", "inf", "nan"])
def test_a_number_that_no_gguf_could_hold_is_named(value):
    """An fp16 bin's keys are JSON."""
    with pytest.raises(FileError, match=r"a is .{1,60}, expected 0 to 1e"):
        Keys({"a": value}, "config.json").number("a")


@pytest.mark.parametrize("value", [0.0, 1.0, -4.0, math.nan, "eight"], ids=repr)
@pytest.mark.parametrize("key", ["freq_base", "scaling.attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"])
def test_no_yarn_key_makes_the_tables_fail(tmp_path, key, value):
    """Each value is either refused by name, or gives frequencies that are numbers."""
    from pocketlm.runtime.positions import rope_table

    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    path = write_model(tmp_path / "model.gguf", n_layer=1, rope=scaling, metadata={f"llama.rope.{key}": value})
    plan, said = None, ""
    try:
        plan = plan_of(path)
    except FileError as error:
        said = str(error)
    if plan is None:
        assert f"llama.rope.{key}" in said
    else:
        assert plan.hyper.rope is not None
        assert np.isfinite(rope_table(plan.hyper.rope, 64)).all()


@pytest.mark.parametrize(
    "value", ["rmsnorm", 1, 1.0, [1, 2], ["rms"], "x" * 100_000, "a\nb\x1b[31m"], ids=lambda value: repr(value)[:20]
)
@pytest.mark.parametrize(
    "key", ["pocketlm.norm", "pocketlm.position", "pocketlm.activation", "pocketlm.rope_pairs", "llama.rope.scaling.type"]
)
def test_an_unknown_option_is_named(tmp_path, key, value):
    assert key in complaint(write_model(tmp_path / "model.gguf", n_layer=1, metadata={key: value}))


@pytest.mark.parametrize("value", ["yes", [1, 2], 2], ids=repr)
def test_gated_is_true_or_false(tmp_path, value):
    assert "pocketlm.gated" in complaint(write_model(tmp_path / "model.gguf", n_layer=1, metadata={"pocketlm.gated": value}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general.architecture", "mamba", "'mamba' is not supported"),
        ("general.architecture", 7, "not supported"),
        ("general.architecture", None, "None is not supported"),
        ("general.architecture", "\x1b[31m" + "m" * 50_000, "is not supported"),
        ("general.architecture", ["llama"], "not supported"),
        ("llama.expert_count", 8, "llama.expert_used_count is missing"),
        ("llama.expert_count", [8, 8], "llama.expert_count should be a number"),
        ("llama.attention.head_count", 5, "does not divide the width"),
        ("llama.attention.head_count_kv", 3, "does not divide the 4 heads"),
        ("llama.attention.head_count", [4, 2], "differs from layer to layer"),
        ("llama.attention.causal", False, "llama.attention.causal is False; pocketlm computes with True only"),
        ("llama.attention.causal", [True], "llama.attention.causal is"),
        ("llama.rope.scaling.yarn_ext_factor", 0.5, "llama.rope.scaling.yarn_ext_factor is 0.5"),
        ("llama.rope.dimension_count", 7, "even number"),
        ("llama.rope.dimension_count", 18, "even number up to 16"),
        ("llama.attention.value_length", 8, "llama.attention.value_length"),
        ("llama.block_count", 1_000_000, "blk.1.attn_norm.weight is missing"),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.embedding_length", 32, "expected"),
        ("llama.feed_forward_length", 97, "expected 97x64"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_explained(tmp_path, key, value, said):
    assert said in complaint(write_model(tmp_path / "model.gguf", n_layer=1, metadata={key: value}))


def test_experts_of_an_architecture_that_has_none_are_refused(tmp_path):
    path = write_model(tmp_path / "model.gguf", arch="refact", n_layer=1, metadata={"refact.expert_count": 8})
    assert "mixture-of-experts" in complaint(path)


def test_a_llama_that_says_it_has_no_experts_is_a_dense_one(tmp_path):
    dense = plan_of(write_model(tmp_path / "dense.gguf"))
    said = plan_of(write_model(tmp_path / "said.gguf", metadata={"llama.expert_count": 0}))
    assert said.ops == dense.ops


def test_options_that_an_architecture_does_not_imply_must_be_said(tmp_path):
    for name in ("norm", "position", "activation", "gated"):
        path = write_model(tmp_path / "model.gguf", arch="pocketlm", metadata={f"pocketlm.{name}": None})
        assert f"pocketlm.{name}" in complaint(path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blk.0.ffn_up.weight": None}, "blk.0.ffn_up.weight is missing"),
        ({"output_norm.weight": None}, "output_norm.weight is missing"),
        ({"blk.1.attn_q.weight": np.ones((64, 63), np.float32)}, "blk.1.attn_q.weight is 64x63, expected 64x64"),
        ({"blk.0.attn_norm.weight": np.ones(63, np.float32)}, "is 63, expected 64"),
        ({"blk.0.attn_norm.weight": np.ones((1, 64), np.float32)}, "is 1x64, expected 64"),
        ({"blk.0.ffn_down.bias": np.ones(3, np.float32)}, "blk.0.ffn_down.bias is 3, expected 64"),
        ({"output.weight": np.ones((7, 64), np.float32)}, "output.weight is 7x64"),
        ({"rope_freqs.weight": np.ones(5, np.float32)}, "rope_freqs.weight is 5, expected 8"),
        ({"blk.2.attn_q.weight": np.ones((64, 64), np.float32)}, "blk.2.attn_q.weight"),
        ({"what\n\x1b[31m": np.ones(4, np.float32)}, "is not part of the architecture llama"),
        ({f"extra.{i}": np.ones(4, np.float32) for i in range(50)}, "(and 47 more)"),
        ({"token_embd.weight": np.ones(64, np.float32)}, "token_embd.weight is 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit_are_listed(tmp_path, tensors, said):
    assert said in complaint(write_model(tmp_path / "model.gguf", tensors=tensors))


# ── an architecture of its own ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def capped(monkeypatch) -> str:
    """The architecture "capped": a Llama whose logits are capped at a key of its own."""

    def operations(m):
        common.pre_norm(m)
        m.softcap("logits", m.number("final_cap", low=0.1))

    module = SimpleNamespace(USUAL=ARCHITECTURES["llama"].USUAL, SETTINGS=("final_cap",), operations=operations)
    monkeypatch.setitem(ARCHITECTURES, "capped", module)
    return "capped"


def file_of(tmp_path, arch: str, **keys: Any):
    plain = write_model(tmp_path / "llama.gguf", n_layer=1)
    with open_gguf(plain) as file:
        own = {key.replace("llama.", f"{arch}."): value for key, value in file.metadata.items() if key.startswith("llama.")}
    keys = {f"{arch}.{name}": value for name, value in keys.items()}
    return write_model(tmp_path / "model.gguf", n_layer=1, metadata={**own, "general.architecture": arch, **keys})


def test_a_new_architecture_is_one_file_and_one_row(tmp_path, capped):
    from pocketlm.export.hyper_keys import architecture_keys

    plan = plan_of(file_of(tmp_path, capped, final_cap=2.5))
    assert plan.ops[-1] == P.Softcap("logits", "logits", 2.5)
    keys = {"general.architecture": capped, **architecture_keys(plan.hyper)}
    assert read_hyper(keys, plan.hyper.n_vocab, "again") == plan.hyper  # its key goes along where the model is written


@pytest.mark.parametrize("value", [None, 0.0, math.nan, "two", [2.5], True], ids=repr)
def test_an_absurd_setting_of_an_architecture_is_named(tmp_path, capped, value):
    assert "capped.final_cap" in complaint(file_of(tmp_path, capped, final_cap=value))


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("architecture", TINY)
def test_hyper_parameters_are_those_of_the_file(tmp_path, architecture):
    path = write_model(
        tmp_path / "model.gguf", arch=architecture, n_layer=3, n_embd=48, n_head=6, n_kv_head=2, n_ff=80, n_ctx=99, eps=1e-6
    )
    hyper = plan_of(path).hyper
    assert (hyper.n_layer, hyper.n_embd, hyper.n_head, hyper.n_kv_head, hyper.head_dim) == (3, 48, 6, 2, 8)
    assert (hyper.n_ff, hyper.n_ctx, hyper.n_vocab, hyper.norm_eps) == (80, 99, len(TOKENS), pytest.approx(1e-6))
    assert (hyper.q_width, hyper.kv_width) == (48, 16)


def test_one_value_a_layer_is_accepted_where_all_agree(tmp_path):
    path = write_model(
        tmp_path / "model.gguf", metadata={"llama.attention.head_count_kv": [4, 4], "llama.feed_forward_length": [96, 96]}
    )
    assert plan_of(path).hyper.n_kv_head == 4


def test_the_old_key_for_linear_scaling_still_counts(tmp_path):
    rope = plan_of(write_model(tmp_path / "model.gguf", metadata={"llama.rope.scale_linear": 4.0})).hyper.rope
    assert rope is not None
    assert (rope.scaling, rope.factor) == ("linear", 4.0)


def test_the_plan_is_a_short_list(tmp_path):
    plan = plan_of(write_model(tmp_path / "model.gguf", n_layer=1))
    kinds = [type(op) for op in plan.ops]
    assert kinds == [
        P.Embed, P.Norm, P.Linear, P.Rotate, P.Attend, P.Linear, P.Add,
        P.Norm, P.Linear, P.Activate, P.Linear, P.Add, P.Norm, P.Logits,
    ]  # fmt: skip
    assert plan.buffers["qkv"] == 3 * 64
    assert plan.buffers["ff"] == 2 * 96


@pytest.mark.parametrize(("tied", "table"), [(True, "token_embd.weight"), (False, "output.weight")])
def test_a_missing_output_means_a_tied_head(tmp_path, tied, table):
    head = plan_of(write_model(tmp_path / "model.gguf", tied=tied)).ops[-1]
    assert isinstance(head, P.Logits)
    assert head.matrix.weights == (table,)


def test_biases_may_be_there_one_by_one(tmp_path):
    some = {"blk.0.attn_q.bias": np.ones(64, np.float32), "blk.1.ffn_down.bias": np.ones(64, np.float32)}
    plan = plan_of(write_model(tmp_path / "model.gguf", tensors=some))
    biases = [bias for op in plan.ops if isinstance(op, P.Linear) for bias in op.matrix.biases if bias]
    assert biases == list(some)
