"""What no checkpoint says: settings and names that the user gives, and what is said where they are missing or wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from checkpoint_checks import MAP, SPELLINGS, check, read_canonical, save

from pocketlm.errors import FileError, UsageError

torch = pytest.importorskip("torch", reason="checkpoints are made with PyTorch")
models = pytest.importorskip("torch_models")


def test_rotary_positions_of_a_home_made_model_are_asked_for_and_partly_rotated_ones_run(tmp_path: Path) -> None:
    frequencies = 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)  # half of every head's 8 values
    module = models.initialise(models.Decoder(models.spelled(*SPELLINGS[1]), "halves", frequencies=frequencies))
    path = save(tmp_path, {"model": module.state_dict(), "config": {"n_heads": 4, "use_rope": True, "rotary_pct": 0.5}})
    with pytest.raises(FileError, match=r"rope_pairs, rope_theta.* add .*--set rope_pairs=half\|interleaved") as error:
        read_canonical(path)
    assert "n_ctx" in str(error.value)
    settings = {"rope_pairs": "half", "rope_theta": "10000", "n_ctx": "64", "norm_eps": "1e-5"}
    model = read_canonical(path, overrides=settings)
    assert model.hyper.architecture == "pocketlm"
    check(module, model, tmp_path)


@pytest.mark.parametrize("flag", ["use_rope", "rope", "use_rotary"])
def test_a_flag_that_says_no_to_rotary_positions_is_heard(flag: str, tmp_path: Path) -> None:
    weights = models.initialise(models.Decoder(models.spelled(*SPELLINGS[1]), "halves")).state_dict()
    said = {"n_heads": 4, "n_ctx": 64, "norm_eps": 1e-5, "rope_theta": 1e4, "rope_pairs": "half"}
    assert read_canonical(save(tmp_path, {"model": weights, "config": said})).hyper.position == "rope"
    path = save(tmp_path, {"model": weights, "config": {**said, flag: False}})
    with pytest.raises(FileError, match=r"tell position; add --set position=alibi\|rope\|none"):
        read_canonical(path)
    assert read_canonical(path, overrides={"position": "none"}).hyper.position == "none"
    path = save(tmp_path, {"model": weights, "config": {**said, flag: False, "use_alibi": True}})
    assert read_canonical(path).hyper.position == "alibi"


@pytest.mark.parametrize("name", ["rotary_dim", "rope_dim"])
def test_the_dimensions_that_turn_may_be_a_number(name: str, tmp_path: Path) -> None:
    weights = models.initialise(models.Decoder(models.spelled(*SPELLINGS[1]), "halves")).state_dict()
    said = {"n_heads": 4, "n_ctx": 64, "norm_eps": 1e-5, "rope_theta": 1e4, "rope_pairs": "half", "residual_scale": 1.0}
    hyper = read_canonical(save(tmp_path, {"model": weights, "config": {**said, name: 4}})).hyper
    assert (hyper.head_dim, hyper.rope.n_dims) == (8, 4)
    for config in ({name: 40}, {"rotary_pct": 1e308}):
        with pytest.raises(FileError, match=r"rope.dimension_count is .*, expected an even number up to 8"):
            read_canonical(save(tmp_path, {"model": weights, "config": {**said, **config}}))


@pytest.mark.parametrize("flag", ["use_rmsnorm", "use_rms_norm", "rmsnorm"])
def test_a_flag_says_which_norm_it_is(flag: str, tmp_path: Path) -> None:
    weights = models.initialise(models.Decoder(models.spelled(*SPELLINGS[1]), "halves")).state_dict()
    said = {"n_heads": 4, "n_ctx": 64, "norm_eps": 1e-5, "position": "none"}
    for answer, norm in ((True, "rms"), (False, "layer")):
        path = save(tmp_path, {"model": weights, "config": {**said, flag: answer}})
        assert read_canonical(path).hyper.norm == norm


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "tell n_head"),
        ({"n_head": 0}, "tell n_head"),
        ({"n_head": 5}, "correct it with --set n_head=N"),
        ({"n_head": 4, "activation": "relu2"}, "activation = 'relu2'".replace("'", "")),
        ({"n_head": 4, "num_experts": 8}, "num_experts = 8"),
        ({"n_head": 4, "qk_norm": True}, "qk_norm = True"),
        ({"n_head": 4, "norm_first": False}, "norm_first = False"),
        *(({"n_head": 4, name: value}, f"{name} = {value}") for name, value in {
            "logit_cap": 30.0, "logits_soft_cap": 30.0, "final_logit_softcap": 30.0, "attn_softcap": 50.0,
            "sandwich_norm": True, "parallel_block": True, "scale_embed": True, "embed_scale": True, "embedding_scale": 12.0,
            "residual_scale": 0.2, "attn_scale": 0.1, "rope_scaling": 2.0,
            "norm_position": "post", "normalize_before": False, "post_ln": True, "rope_freq": {"factor": 8.0},
        }.items()),
        ({"n_head": 4, "window_size": 8}, "sliding window of 8 positions"),
        ({"n_head": 4, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ],
)
def test_what_nothing_tells_is_asked_for_and_what_is_not_computed_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = save(tmp_path, {"model": models.GPT().state_dict(), "model_args": config})
    with pytest.raises(FileError, match=re.escape(said)) as error:
        read_canonical(path)
    assert "\n" not in str(error.value)


def test_left_over_missing_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    state, args = models.GPT(bias=False, masks=False).state_dict(), {"n_head": 4}
    cases = {
        "2 of 18 tensors have no place in the model: transformer.h.0.attn.q_norm.weight, extra": {
            **state, "transformer.h.0.attn.q_norm.weight": torch.ones(8), "extra": torch.ones(3),
        },
        "blk.1.ffn_down.weight is missing": {n: t for n, t in state.items() if n != "transformer.h.1.mlp.c_proj.weight"},
        "blk.1.ffn_down.weight is 32x127, expected 32x128": {
            **state, "transformer.h.1.mlp.c_proj.weight": torch.ones(32, 127),
        },
        "no tensor has the role of token_embd.weight": {n: t for n,
        t in state.items() if "wte" not in n and "lm_head" not in n},
    }  # fmt: skip
    for said, tensors in cases.items():
        with pytest.raises(FileError, match=re.escape(said)) as error:
            read_canonical(save(tmp_path, {"model": tensors, "model_args": args}))
        if "no place" in said:  # three are named, and what names the others
            assert "pocketlm inspect --tensors" in str(error.value)


def test_settings_that_make_no_sense_are_usage_errors(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": models.GPT().state_dict(), "model_args": {"n_head": 4}})
    for settings in ({"heads": "4"}, {"n_head": "four"}, {"position": "sideways"}, {"norm_eps": "nan"}, {"n_head": "0"}):
        with pytest.raises(UsageError, match="--set"):
            read_canonical(path, overrides=settings)


def test_a_map_names_what_nobody_foresaw(tmp_path: Path) -> None:
    module = models.initialise(models.GPT(bias=False, masks=False))
    new = {"wte": "words", "wpe": "places", "ln_f": "last", "h": "stem", "ln_1": "a.gain", "ln_2": "b.gain"}
    parts = {"attn.c_attn": "qkv_all", "attn.c_proj": "mix", "mlp.c_fc": "wide", "mlp.c_proj": "narrow"}
    state = {"note": torch.ones(3), "stem.0.drawing": torch.ones(4, 4)}
    for name, tensor in module.state_dict().items():
        if name != "lm_head.weight":
            for old, given in parts.items():
                name = name.replace(old, given)
            parts_of_name = name.removeprefix("transformer.").removesuffix(".weight").split(".")
            state[".".join(str(new.get(part, part)) for part in parts_of_name)] = tensor
    (tmp_path / "names.toml").write_text('# the "old" names\n' + MAP.replace('"\n', '" # once "this"\n'))
    check(module, read_canonical(save(tmp_path, state), mapping=tmp_path / "names.toml"), tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "[names]\na = b",
        '[names]\na = "blk.0.attention.weight"',
        '[names]\n"a.{i}" = "output.weight"',
        '[names]\n"a" = ["output.weight"]',
        "a = " + "#" * 100_000 + '"',  # minutes, where each of them is tried as the beginning of a comment
        "n_head = 4",
        "[names",
        "x = {}",
        "[set]\nx = []",
    ],
)
def test_a_wrong_map_is_one_line_with_its_number(line: str, tmp_path: Path) -> None:
    (tmp_path / "names.toml").write_text(line)
    with pytest.raises(FileError, match=r"names.toml: line \d"):
        read_canonical(save(tmp_path, models.GPT().state_dict()), mapping=tmp_path / "names.toml")
