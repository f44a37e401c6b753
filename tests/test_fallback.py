"""What native lacks NumPy does, where nobody named a backend: with one line, and the same logits as always."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import llvmlite.binding as llvm
import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.runtime import model_file
from pocketlm.runtime import operations as P
from pocketlm.runtime.activations import ACTIVATIONS
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.native import compiler, kernels
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.tiling import LAYOUTS
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import Plan, make_plan

IDS = np.array([5, 6, 7])


@pytest.fixture
def opened(tmp_path):
    with model_file.open_model(write_model(tmp_path / "m.gguf", format="Q4_0", n_ff=64)) as file:
        yield file


def plan_of(file) -> Plan:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return make_plan(read_hyper(file.metadata, shapes["token_embd.weight"][0], file.path), shapes, file.path)


def check(file, plan: Plan, words: str, capsys) -> None:
    """`auto` is NumPy and says so in one line; native by name is an error that says the same."""
    with pytest.raises(NativeUnavailable, match=words) as error:
        make_executor("native", plan, file.tensors, 32, 1, file.path)
    assert capsys.readouterr().err == ""
    executor = make_executor("auto", plan, file.tensors, 32, 1, file.path)
    assert capsys.readouterr().err == f"pocketlm: running on NumPy, which is slower: {error.value}\n"
    assert executor.name == "numpy"
    np.testing.assert_array_equal(executor.forward(IDS), NumpyExecutor(plan, file.tensors, 32, 1).forward(IDS))


@pytest.fixture
def without_q4_0() -> Iterator[None]:
    """Native knows no Q4_0. Afterwards all are there in their order: it is that of a stub's kernels."""
    before = dict(LAYOUTS)
    del LAYOUTS["Q4_0"]
    yield
    LAYOUTS.clear()
    LAYOUTS.update(before)


def test_a_format_without_native_code(opened, without_q4_0, capsys):
    check(opened, plan_of(opened), "no native code for Q4_0 weights", capsys)


def test_an_order_of_operations_that_no_model_has_runs_all_the_same(opened):
    plan = plan_of(opened)
    twice = next(op for op in plan.ops if isinstance(op, P.Norm))
    plan = replace(plan, ops=(plan.ops[0], twice, *plan.ops[1:]))
    native, numpy = (make_executor(backend, plan, opened.tensors, 32, 1, opened.path) for backend in ("native", "numpy"))
    np.testing.assert_allclose(native.forward(IDS), numpy.forward(IDS), atol=1e-2)


def test_an_operation_without_native_code(opened, monkeypatch, capsys):
    @dataclass(frozen=True)
    class Double:
        x: str

    def double(self, op, state):
        state[op.x] = state[op.x] * 2

    real = NumpyExecutor.__init__

    def knowing_double(self, *words):
        real(self, *words)
        self._run[Double] = lambda op, state: double(self, op, state)

    monkeypatch.setattr(NumpyExecutor, "__init__", knowing_double)
    plan = plan_of(opened)
    changed = replace(plan, ops=(plan.ops[0], Double("x"), *plan.ops[1:]))  # type: ignore[arg-type]
    check(opened, changed, "no native code for Double", capsys)


def test_an_activation_without_native_code(opened, monkeypatch, capsys):
    monkeypatch.setitem(ACTIVATIONS, "tanh", np.tanh)
    plan = plan_of(opened)
    ops = tuple(replace(op, kind="tanh") if isinstance(op, P.Activate) else op for op in plan.ops)
    check(opened, replace(plan, ops=ops), "no native code for Activate of the kind 'tanh'", capsys)


def test_an_llvmlite_that_is_too_old(opened, monkeypatch, tmp_path, capsys):
    """The LLVM 20 of llvmlite 0.47 refused what others compile."""
    monkeypatch.setattr(llvm, "llvm_version_info", (20, 1, 8))
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_target_machine", compiler._target_machine.__wrapped__)
    monkeypatch.setattr(kernels, "loaded", kernels.loaded.__wrapped__)
    check(opened, plan_of(opened), "need a newer llvmlite; get it with: pip install", capsys)


def test_a_model_says_which_backend_runs(tmp_path, without_q4_0, capsys):
    path = write_model(tmp_path / "m.gguf", format="Q4_0", n_ff=64)
    with pocketlm.load(path) as model:
        assert model.backend == "numpy"
        with pytest.raises(NativeUnavailable):
            model.set_backend("native")
        assert model.backend == "numpy"
        assert list(model.generate([5], max_tokens=2, ignore_eos=True))[-1].generated_tokens == 2
