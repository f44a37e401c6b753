"""OpenVINO on the CPU: 4-bit weights, a cache inside the model, arithmetic in the precision that it chooses (bfloat16 where
the processor has it).

The model is what OpenVINO GenAI or Optimum makes of the file (convert.py). Logits are computed from the position FIRST_ROW
on only, as OpenVINO GenAI's own pipeline changes the graph; the cache is cut by setting the model's states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from pocketlm.bench.convert import FIRST_ROW
from pocketlm.errors import PocketlmError


class OpenVino:
    def __init__(self, path: str, n_threads: int, n_ctx: int):
        core = openvino.Core()
        model = core.read_model(Path(path) / "openvino_model.xml")
        _logits_from(model)
        hints = {"INFERENCE_NUM_THREADS": n_threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        compiled = core.compile_model(model, "CPU", hints)
        self._request: Any = compiled.create_infer_request()
        self._names = {name for entry in compiled.inputs for name in entry.names}
        self._length = 0
        said = {name: compiled.get_property(name) for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")}
        self.facts = {
            "version": f"openvino {openvino.__version__.split('-')[0]}",
            "build": "CPU, 4-bit weights in groups of 32, states inside the model",
            "settings": f"INFERENCE_NUM_THREADS = {n_threads}, PERFORMANCE_HINT = LATENCY, arithmetic in "
            f"{_type(said['INFERENCE_PRECISION_HINT'])}, cache in {_type(said['KV_CACHE_PRECISION'])}",
        }

    def truncate(self, length: int) -> None:
        if length >= self._length:
            return
        if length == 0:
            self._request.reset_state()
        for state in self._request.query_state() if length else ():
            state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self._length = length

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        n, total = len(ids), self._length + len(ids)
        feed = {
            "input_ids": ids.astype(np.int64)[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
            FIRST_ROW: np.array([0 if rows == "all" else n - 1], np.int64),
        }
        self._request.infer({name: value for name, value in feed.items() if name in self._names}, share_inputs=True)
        self._length = total
        return self._request.get_tensor("logits").data[0]

    def close(self) -> None:
        del self._request


def _type(element: Any) -> str:
    return element.get_type_name() if hasattr(element, "get_type_name") else str(element)


def _logits_from(model: Any) -> None:
    """Give the graph an input FIRST_ROW and let it compute logits from that position on only."""
    from openvino import opset13 as ops

    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
        if not node.get_input_size():
            raise PocketlmError("the product that gives the logits was not found in OpenVINO's graph")
    first = ops.parameter([1], np.int64, FIRST_ROW)
    first.output(0).get_tensor().set_names({FIRST_ROW})
    end, step, axis = (ops.constant(np.array([value], np.int64)) for value in (1 << 62, 1, 1))
    node.input(0).replace_source_output(ops.slice(node.input_value(0), first, end, step, axis).output(0))
    model.add_parameters([first])
    model.validate_nodes_and_infer_types()
