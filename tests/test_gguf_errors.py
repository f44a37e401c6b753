"""Files that are no sound GGUF files: each is refused with one line that names what is wrong.

Among them are the published vulnerabilities of GGUF parsers. Each of those tests says what the flaw was; where the
advisory gives no file, the test holds the smallest one of the class it describes.
"""
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import Entry, Field, file_bytes, file_fields, header, join, key, table_bytes, tensor, text, u32, u64

from pocketlm.errors import FileError
from pocketlm.runtime.gguf_reader import open_gguf, parse
from pocketlm.runtime.model_file import open_model

F32, Q4_0, I8 = 0, 2, 24


def refused(data: bytes) -> str:
    """The line with which `data` is refused, having used next to no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(FileError) as caught:
            parse(data, Path("model.gguf"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "memory was taken for what the file claims"
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    assert message.isprintable()
    return message


def refused_tensors(*entries: Entry) -> str:
    return refused(table_bytes(*entries))


# ── published vulnerabilities ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_dims", [5, 8, 255, 2**31, 2**32 - 1])
def test_cve_2024_21802_more_dimensions_than_a_tensor_has(n_dims):
    # ggml read n_dims sizes into `info->ne`, an array of four: heap overflow
    dims = [1] * min(n_dims, 300)
    assert f"has {n_dims} dimensions" in refused_tensors(Entry("t", dims, F32, 0, n_dims))


@pytest.mark.parametrize("n_keys", [2**31 - 1, 2**32, 2**64 // 48 + 1, 2**60 + 1, 2**63, 2**64 - 1])
def test_cve_2024_23605_number_of_keys_whose_size_overflows(n_keys):
    # ggml allocated header.n_kv * sizeof(struct gguf_kv) bytes; the product wrapped and the keys were written past the end
    assert f"claims {n_keys} keys" in refused(join([*header(0, n_keys), *key("a", "u8", 1), Field("text", bytes(200))]))


@pytest.mark.parametrize("n_tensors", [2**31 - 1, 2**32, 2**64 // 88 + 1, 2**63, 2**64 - 1])
def test_cve_2024_21836_number_of_tensors_whose_size_overflows(n_tensors):
    # the same with header.n_tensors
    fields = [*header(n_tensors, 0), *Entry("t", [1], F32, 0).fields(), Field("data", bytes(200))]
    assert f"claims {n_tensors} tensors" in refused(join(fields))


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 2**63, 2**64 - 2, 2**64 - 1])
def test_cve_2024_23496_string_length_that_overflows(length):
    # gguf_fread_str allocated length + 1 bytes, which is none for 2^64 - 1, and read length bytes into them
    value = [*text("a"), u32("type", 8), u64("length", length), Field("text", bytes(100))]
    assert "the value of 'a' goes on beyond its end" in refused(join([*header(0, 1), *value]))
    assert "the name of key 0" in refused(join([*header(0, 1), u64("length", length), Field("text", bytes(100))]))
    assert "the name of tensor 0" in refused(join([*header(1, 0), u64("length", length), Field("text", bytes(100))]))


@pytest.mark.parametrize("item_type", [0, 4, 7, 8, 10, 12])
@pytest.mark.parametrize("count", [2**29, 2**60 + 1, 2**61 + 1, 2**63, 2**64 - 1])
def test_cve_2024_21825_array_whose_size_overflows(item_type, count):
    # ggml allocated count * size of an item; the product wrapped
    value = [*text("a"), u32("type", 9), u32("type", item_type), u64("count", count), Field("data", bytes(100))]
    assert "'a'" in refused(join([*header(0, 1), *value]))


def test_cve_2025_53630_sum_of_tensor_sizes_that_overflows():
    # gguf_init_from_file_impl added up the padded sizes in 64 bits; the sum wrapped (here to 32), and a buffer of that size
    # was to hold all of them
    huge = 2**63 - 32
    assert "bytes are missing" in refused_tensors(
        Entry("a", [huge], I8, 0), Entry("b", [huge], I8, huge), Entry("c", [96], I8, 2 * huge % 2**64)
    )


def test_cve_2026_27940_sum_of_sizes_and_overheads_that_overflows():
    # The fix of CVE-2025-53630 let through sums just below 2^64; adding ggml's overhead for each tensor (some 368 bytes)
    # wrapped then, and the file's data were read past the end of the small buffer
    first, second = 2**63 - 64, 2**63 - 704
    assert "bytes are missing" in refused_tensors(Entry("a", [first], I8, 0), Entry("b", [second], I8, first))


@pytest.mark.parametrize(
    "dims",
    [
        [2**20, 2**42 + 1],  # 2^64 + 2^22 bytes: 4 MB after the wrap, the case the advisory describes
        [4, 2**30 - 1, 2**30 + 1],  # 2^64 - 16 bytes: 0 after the padding
        [2**62],  # 2^64 bytes: 0
        [2**32, 2**32],  # 2^64 weights: 0
        [2**32, 2**32, 2**32, 2**32],
        [2**63, 2],
        [2**64 - 1],  # -1 for a signed reader
        [2**63 - 1, 2],  # a negative number of weights
        [1, 1, 1, 2**64 - 1],
    ],
)
def test_cve_2026_33298_tensor_size_that_overflows(dims):
    # ggml_nbytes multiplied the dimensions in 64 bits: exabytes to the code that walks the tensor, megabytes to the allocator
    message = refused_tensors(Entry("t", dims, F32, 0))
    assert "bytes are missing" in message or "the impossible shape" in message


@pytest.mark.parametrize(
    ("entry", "n_missing"),
    [
        (Entry("t", [4096, 4096], F32, 0), 4096 * 4096 * 4 - 4096),  # larger than the data
        (Entry("t", [32], F32, 4096), 128),  # begins where the file ends
        (Entry("t", [32], F32, 2**40), 2**40 + 128 - 4096),  # far behind it
        (Entry("t", [1025], F32, 0), 4),  # one weight too many
        (Entry("t", [32 * 228], Q4_0, 0), 8),  # the last block is cut
    ],
)
def test_cve_2026_7482_tensor_that_reaches_beyond_the_file(entry, n_missing):
    # Ollama believed the declared offsets and sizes when it quantised a file, read past its buffer and wrote other
    # users' data into the new model
    assert f"the file is cut short: {n_missing} bytes are missing; download it again" in refused_tensors(entry)


@pytest.mark.parametrize("alignment", [0, 1, 2, 4, 7, 24, 33, 2**20 + 1, 2**21, 2**30, 2**31, 2**32 - 1])
def test_unbounded_alignment(alignment):
    # No number in the list above, but published with them: 0 divides by zero, 2^31 overflows the padding
    data = table_bytes(Entry("t", [1], F32, 0), keys=[key("general.alignment", "u32", alignment)])
    assert f"general.alignment is {alignment}, not a power of two" in refused(data)


@pytest.mark.parametrize("value", [("i32", 32), ("u64", 32), ("f32", 32.0), ("string", "32"), ("array of u32", [32])])
def test_alignment_of_another_type(value):
    data = file_bytes(key("general.alignment", *value))
    assert "general.alignment is not a 32-bit unsigned number" in refused(data)


# ── what else can be wrong inside ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", [0, 1, 4, 5, 77])
def test_other_versions_are_named(version):
    assert f"is GGUF version {version}; pocketlm reads versions 2 and 3" in refused(join(header(0, 0, version)))


def test_a_big_endian_file_is_called_so():
    assert "is a big-endian GGUF file" in refused(b"GGUF" + bytes([0, 0, 0, 3]) + bytes(16))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (Entry("t", [], F32, 0), "has 0 dimensions"),
        (Entry("t", [0], F32, 0), "the impossible shape 0"),
        (Entry("t", [4, 0, 2], F32, 0), "the impossible shape 4 × 0 × 2"),
        (Entry("t", [33, 2], Q4_0, 0), "rows of 33 weights, not a multiple of the 32 of Q4_0"),
        (Entry("t", [4], F32, 4), "begins at 4, which is not a multiple of the alignment 32"),
        (Entry("t", [4], 4, 0), "the unknown format 4"),
        (Entry("t", [4], 2**32 - 1, 0), "the unknown format 4294967295"),
        (Entry("x" * 65, [4], F32, 0), "65 bytes long, more than the 64 allowed"),
        (Entry(b"\xff\xfe", [4], F32, 0), "the name of tensor 0 is not UTF-8"),
    ],
)
def test_impossible_tensors_are_refused(entry, problem):
    assert problem in refused_tensors(entry)


def test_tensors_that_overlap_are_refused():
    assert "tensors 'a' and 'b' overlap" in refused_tensors(Entry("b", [64], F32, 32), Entry("a", [16], F32, 0))
    assert "overlap" in refused_tensors(Entry("a", [16], F32, 64), Entry("b", [16], F32, 64))


def test_names_that_occur_twice_are_refused():
    assert "tensor 't' is there twice" in refused_tensors(Entry("t", [8], F32, 0), Entry("t", [8], F32, 32))
    assert "key 'a' is there twice" in refused(file_bytes(key("a", "u8", 1), key("a", "string", "b")))


@pytest.mark.parametrize("value_type", [13, 255, 2**32 - 1])
def test_unknown_value_types_are_refused(value_type):
    alone = [*text("a"), u32("type", value_type), Field("data", bytes(64))]
    assert f"of the unknown type {value_type}" in refused(join([*header(0, 1), *alone]))
    items = [*text("a"), u32("type", 9), u32("type", value_type), u64("count", 1), Field("data", bytes(64))]
    assert f"of the unknown type {value_type}" in refused(join([*header(0, 1), *items]))


def test_arrays_of_arrays_are_refused_however_deep():
    nested = [field for _ in range(100_000) for field in (u32("type", 9), u64("count", 1))]
    data = join([*header(0, 1), *text("a"), u32("type", 9), *nested])
    assert "is an array of arrays" in refused(data[: 1 << 18])


def test_more_strings_than_any_vocabulary_has_are_refused_even_if_they_are_there():
    value = [*text("a"), u32("type", 9), u32("type", 8), u64("count", 2**21 + 1), Field("data", bytes(8 * (2**21 + 1)))]
    assert "'a' claims 2097153 strings where at most 2097152 are possible" in refused(join([*header(0, 1), *value]))


@pytest.mark.parametrize("bad", [2, 255])
def test_truth_values_are_0_or_1(bad):
    alone = [*text("a"), u32("type", 7), Field("number", bytes([bad]))]
    items = [*text("a"), u32("type", 9), u32("type", 7), u64("count", 3), Field("number", bytes([0, 1, bad]))]
    for value in (alone, items):
        assert "a truth value other than 0 and 1" in refused(join([*header(0, 1), *value]))


def test_key_names_are_utf8_of_at_most_65535_bytes():
    assert "the name of key 0 is not UTF-8" in refused(file_bytes(key(b"\xff", "u8", 1)))
    assert "65536 bytes long, more than the 65535 allowed" in refused(file_bytes(key("x" * 65536, "u8", 1)))


def test_names_from_the_file_cannot_break_or_flood_the_line():
    hostile = "\x1b[31m\r\n\u202e" + "x" * 60000
    message = refused(file_bytes(key(hostile, "u8", 1), key(hostile, "u8", 1)))
    assert len(message) < 300


def test_more_keys_than_any_model_has_are_refused_even_if_they_are_there():
    keys = [key(str(i), "u8", 1) for i in range(32769)]
    assert "claims 32769 keys where at most 32768 are possible" in refused(file_bytes(*keys))


# ── files that are something else ────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match=r"nothing.gguf: there is no such file"):
        open_gguf(tmp_path / "nothing.gguf")


def test_a_folder(tmp_path):
    with pytest.raises(FileError, match="is a folder, not a file"):
        open_gguf(tmp_path)


def test_a_folder_of_hugging_face_says_that_it_is_to_be_converted(tmp_path):
    with pytest.raises(FileError, match=r"is a folder without config.json and weights.bin; name the GGUF file, or convert"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(FileError, match=r"a config.json, perhaps Hugging Face's; convert it with pocketlm export"):
        open_model(tmp_path)


def test_an_empty_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(FileError, match=r"is empty; download it again"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull):
        with pytest.raises(FileError, match="is a pipe or a device"):
            open_gguf(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_file_one_may_not_read(tmp_path):
    (tmp_path / "a.gguf").write_bytes(join(header(0, 0)))
    (tmp_path / "a.gguf").chmod(0)
    with pytest.raises(FileError, match="cannot be read"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("path", ["nul\0byte.gguf", "x" * 5000, "README.md/x.gguf"])
def test_impossible_paths(path):
    with pytest.raises(FileError):
        open_gguf(path)


def test_a_pytorch_checkpoint_a_safetensors_file_and_others_are_recognised(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"")
    header_of_safetensors = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    others = {
        "a zip archive, perhaps a PyTorch checkpoint; convert it with pocketlm export": (tmp_path / "model.pt").read_bytes(),
        "a pickle": b"\x80\x02}q\x00.",
        "a safetensors file; convert it": len(header_of_safetensors).to_bytes(8, "little") + header_of_safetensors + bytes(4),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a GGML model from before GGUF": b"tjgg" + bytes(40),
        "a web page": b"<!DOCTYPE html><title>404</title>",
        "JSON": b'{"architectures": []}',
        "something else": b"Once upon a time",
        "something else; check the path or download it again": bytes(np.arange(99, dtype=np.uint8)),
    }
    for expected, data in others.items():
        assert f"is not a GGUF file but {expected}" in refused(data)


@pytest.mark.parametrize("n_bytes", [1, 3, 4, 7, 8, 15])
def test_a_file_that_ends_within_the_fixed_header_is_cut_short(n_bytes):
    assert "the file is cut short" in refused(join(file_fields([], [tensor("t", "F32", 4)]))[:n_bytes])
