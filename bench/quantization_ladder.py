"""What every weight format costs: perplexity of one model in each, quantised by pocketlm and by ggml.

    python bench/quantization_ladder.py MODEL.gguf TEXT [--tokens 2000]

The model's weights are dequantised once, then rounded to each format as `pocketlm export --quant` does, and run by the
numpy executor, so that nothing but the weights differs. ggml's quantiser is called through llama-cpp-python where that
is installed. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.quantize import quantize
from pocketlm.export.rules import QUANTS, by_shape, head_name
from pocketlm.runtime.evaluation import perplexity
from pocketlm.runtime.formats import FORMATS, dequantize
from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import read_plan
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import default_threads
from pocketlm.tokenizer import from_metadata

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
WINDOW = 1024
Quantizer = Callable[[str, np.ndarray], np.ndarray]


def rounded(tensors: dict[str, Any], quant: str, quantizer: Quantizer, hyper: Hyper) -> tuple[dict[str, Any], float, float]:
    """The tensors in the formats of `quant` and back, bits per weight, and the relative RMSE of the matrices."""
    head, result, bits, count, errors, squares = head_name(tensors), {}, 0, 0, 0.0, 0.0
    for name, tensor in tensors.items():
        weights, format = tensor.to_float32(), by_shape(name, tensor.shape, QUANTS[quant], head, False, hyper)[0]
        back = weights.copy()
        if format.name != "F32":
            dequantize(format, quantizer(format.name, weights), back)
            errors += float(np.sum((back - weights) ** 2, dtype=np.float64))
            squares += float(np.sum(weights**2, dtype=np.float64))
        bits += weights.size // format.block_size * format.block_bytes * 8
        count += weights.size
        result[name] = back
    return result, bits / count, (errors / squares) ** 0.5 if squares else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    arguments = parser.parse_args()
    file = open_model(arguments.model)
    plan = read_plan(file.metadata, file.tensors, arguments.model)
    hyper = plan.hyper
    tokenizer = from_metadata(file.metadata, arguments.model)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    quantizers: dict[str, Quantizer] = {"pocketlm": quantize}
    try:
        from llama_reference import quantize as ggml_quantize

        quantizers["ggml"] = ggml_quantize
    except ImportError:
        pass

    def measure(weights: dict[str, np.ndarray]) -> float:
        data = {name: array.reshape(-1).view(np.uint8) for name, array in weights.items()}
        tensors = {name: Tensor(name, weights[name].shape, FORMATS["F32"], data[name], 0, arguments.model) for name in data}
        executor = NumpyExecutor(plan, tensors, min(WINDOW, hyper.n_ctx), default_threads())
        result = perplexity(executor, ids, tokenizer.bos_id if tokenizer.adds_bos else None, WINDOW)
        executor.close()
        return result.perplexity

    names = list(quantizers)
    print(f"| `--quant` | bits per weight | {' | '.join(f'error, {n} | perplexity, {n}' for n in names)} |")
    print("|" + "---|" * (2 + 2 * len(names)))
    for quant in QUANTS:
        cells, bits, before, result = [], 0.0, {}, 0.0
        for quantizer in quantizers.values():
            weights, bits, error = rounded(file.tensors, quant, quantizer, hyper)
            if not before or any(not np.array_equal(weights[name], before[name]) for name in weights):
                result = measure(weights)  # the same weights need no second run
            cells.append(f"{error:.3%} | {result:.3f}")
            before = weights
        print(f"| {quant} | {bits:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
