"""x86 levels that this computer may lack: their products, with the instruction that it lacks spelt out, have avx2's bits."""

import re

import numpy as np
import pytest
from native_calls import FORMAT_NAMES, aligned_copy, products, random_blocks, runs_here

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import kernels, linker
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.levels import LEVELS, host_abi
from pocketlm.runtime.native.sizes import tiles
from pocketlm.runtime.native.tiling import tile

AVX2 = LEVELS["avx2"]
pytestmark = pytest.mark.skipif(not runs_here(AVX2), reason="this CPU lacks AVX2")


def vpdpbusd(lanes: int) -> str:
    """@emulated: for each i32 of `s`, four unsigned bytes of `a` times four signed ones of `b`, added to it."""
    ints, wide, n_bytes = f"<{lanes} x i32>", f"<{4 * lanes} x i32>", f"<{4 * lanes} x i8>"
    lines = [f"define internal {ints} @emulated({ints} %s, {n_bytes} %a, {n_bytes} %b) noinline {{"]
    lines += [f"%x = zext {n_bytes} %a to {wide}", f"%y = sext {n_bytes} %b to {wide}", f"%m = mul {wide} %x, %y"]
    for i in range(4):
        those = ", ".join(f"i32 {4 * lane + i}" for lane in range(lanes))
        lines.append(f"%m{i} = shufflevector {wide} %m, {wide} poison, <{lanes} x i32> <{those}>")
        lines.append(f"%s{i} = add {ints} {f'%s{i - 1}' if i else '%s'}, %m{i}")
    return "\n  ".join(lines) + f"\n  ret {ints} %s3\n}}\n"


def spelt_out(text: str) -> str:
    """The module with its own function in place of the instruction."""
    found = re.findall(r"^declare .*@(llvm\.x86\.avx512\.vpdpbusd\.(\d+))\(.*$", text, re.MULTILINE)
    for name, bits in found:
        text = re.sub(rf"^declare .*@{re.escape(name)}\(.*$", vpdpbusd(int(bits) // 32), text, flags=re.MULTILINE)
        text = text.replace(f"@{name}", "@emulated")
    return text


LOOKED_UP = ("IQ4_NL", "IQ4_XS", "MXFP4")  # AVX-512 has an instruction for that, too


@pytest.mark.parametrize(("name", "fmt"), [
    *(("avx-vnni", fmt) for fmt in FORMAT_NAMES), *(("avx512-vnni", fmt) for fmt in FORMAT_NAMES if fmt not in LOOKED_UP),
])  # fmt: skip
def test_products_have_the_bits_of_avx2(name, fmt):
    random, size = np.random.default_rng(4), FORMATS[fmt].block_size
    text = spelt_out(kernels.module_text(fmt, LEVELS[name], host_abi()))
    assert ("@emulated" in text) == (fmt not in ("F32", "F16", "BF16"))
    other = linker.load(linker.link([compile_object(text, AVX2)]))
    for n_rows, n_blocks in [(1, 1), (21, 3), (40, 7)]:
        n_columns = n_blocks * size if size > 1 else n_blocks * 32
        w = aligned_copy(tile(fmt, random_blocks(fmt, n_rows, n_columns, random), n_rows))
        for tokens in tiles(AVX2.name):
            x = random.standard_normal((tokens, n_columns)).astype(np.float32)
            found = products(other, name, fmt, w, n_rows, n_columns // size, x)
            expected = products(kernels.loaded(fmt, AVX2), AVX2.name, fmt, w, n_rows, n_columns // size, x)
            assert np.isfinite(expected).all()
            assert found.tobytes() == expected.tobytes(), f"{n_rows} rows, {n_blocks} blocks, {tokens} tokens"
    other.close()
