"""What the GGUF reader reads: against the writer and the reader of the `gguf` package, and the promises about memory."""
import mmap
import weakref
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import EVERY_FORMAT, EVERY_VALUE_TYPE, Entry, file_bytes, file_fields, header, join, key, table_bytes, tensor
from tiny_models import write_out

from pocketlm.errors import FileError
from pocketlm.runtime.gguf_reader import open_gguf, parse
from pocketlm.runtime.tensor import Tensor

PATH = Path("model.gguf")


def mapping_of(weights: Tensor) -> mmap.mmap:
    base = weights.data
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    assert isinstance(base, mmap.mmap), "the data are a view of the mapping, not a copy"
    return base


@pytest.fixture
def sound_file(tmp_path) -> Path:
    path = tmp_path / "sound.gguf"
    path.write_bytes(join(file_fields(EVERY_VALUE_TYPE, EVERY_FORMAT)))
    return path


def test_every_value_type_written_by_the_gguf_package_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the independent writer")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    expected: dict[str, object] = {"general.architecture": "llama"}
    scalars = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e300, "bool": True, "string": "Grüße 世界",
    }  # fmt: skip
    for type_name, value in scalars.items():
        getattr(writer, f"add_{type_name}")(f"test.{type_name}", value)
        expected[f"test.{type_name}"] = value
    arrays = {"ints": [-1, 2, 3], "floats": [0.5, -2.0], "bools": [True, False], "strings": ["", "ğ", "a\0b"]}
    for name, values in arrays.items():
        writer.add_array(f"test.{name}", values)
        expected[f"test.{name}"] = values
    write_out(writer)
    with open_gguf(tmp_path / "a.gguf") as ours:
        read = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in ours.metadata.items()}
        assert read == expected
        assert [type(read[f"test.{name}"]) for name in scalars] == [type(value) for value in scalars.values()]


@pytest.mark.parametrize("alignment", [32, 256])
def test_tensors_written_by_the_gguf_package_are_read(tmp_path, alignment):
    gguf = pytest.importorskip("gguf", reason="the independent writer")
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    expected = {}
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        weights = rng.standard_normal((3, 5, 64), np.float32)
        packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
        writer.add_tensor(f"blk.{name}", packed, raw_dtype=gguf.GGMLQuantizationType[name])
        expected[f"blk.{name}"] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]).reshape(weights.shape)
    writer.add_tensor("vector", weights[0, 0])
    expected["vector"] = weights[0, 0]
    write_out(writer)
    with open_gguf(tmp_path / "a.gguf") as ours:
        assert ours.alignment == alignment
        assert list(ours.tensors) == list(expected)
        for name, read in ours.tensors.items():
            assert read.shape == expected[name].shape
            assert np.array_equal(read.to_float32(), expected[name])


@pytest.mark.parametrize("name", ["gguf-gpt-2", "gguf-llama", "ggml-vocab-phi-3"])
def test_a_vocabulary_only_file_reads_as_with_the_gguf_package(name, vocabulary_file):
    gguf = pytest.importorskip("gguf", reason="the independent reader")
    path = vocabulary_file(name)
    fields = gguf.GGUFReader(path).fields
    with open_gguf(path) as ours:
        assert ours.tensors == {}
        assert list(ours.metadata) == [name for name in fields if not name.startswith("GGUF.")]
        for name, value in ours.metadata.items():
            theirs = fields[name].contents()
            assert np.array_equal(value, theirs) if isinstance(value, np.ndarray) else value == theirs


def test_smollm2_has_the_tensors_the_gguf_package_sees(smollm2_path):
    gguf = pytest.importorskip("gguf", reason="the independent reader")
    reader = gguf.GGUFReader(smollm2_path)
    with open_gguf(smollm2_path) as ours:
        assert len(ours.metadata["tokenizer.ggml.tokens"]) == len(ours.metadata["tokenizer.ggml.token_type"]) == 49152
        assert [(t.name, t.shape, t.format.name, t.offset, len(t.data)) for t in ours.tensors.values()] == [
            (t.name, tuple(reversed(t.shape.tolist())), t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
        ]
        for theirs in reader.tensors[:8]:
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            assert np.array_equal(ours.tensors[theirs.name].to_float32(), expected)


def test_version_2_has_the_same_layout():
    fields = file_fields(EVERY_VALUE_TYPE, EVERY_FORMAT)
    version_2 = parse(join(header(len(EVERY_FORMAT), len(EVERY_VALUE_TYPE), version=2) + fields[4:]), PATH)
    assert (version_2.version, len(version_2.tensors)) == (2, len(EVERY_FORMAT))


def test_strings_are_decoded_only_when_asked_for():
    strings = key("a", "array of string", ["fine", b"\xff", "fine"])
    gguf = parse(file_bytes(strings, key("b", "string", b"\xc3"), key("c", "u8", 1)), PATH)
    assert gguf.metadata["c"] == 1
    with pytest.raises(FileError, match="entry 1 of 'a' is not UTF-8"):
        gguf.metadata["a"]
    with pytest.raises(FileError, match="the value of 'b' is not UTF-8"):
        gguf.metadata["b"]


@pytest.mark.parametrize("strings", [[], [""], ["", ""], ["\0"], ["a\0", "", "b"], ["世", "ğ", "🌍"], ["x" * 70000, "y"]])
def test_string_arrays_of_every_kind_come_back(strings):
    assert parse(file_bytes(key("a", "array of string", strings)), PATH).metadata["a"] == strings


@pytest.mark.parametrize("odd", [None, "", "\0" * 9, "a\0\0\0\0\0\0\0b", "x" * 255, "y" * 256, "z" * 70000])
def test_an_odd_string_among_ten_thousand_plain_ones_changes_no_other(odd):
    rng = np.random.default_rng(3)
    strings = ["w" * n for n in rng.integers(1, 40, 10_000)]
    for at in rng.integers(0, 10_000, 0 if odd is None else 3):
        strings[at] = odd
    gguf = parse(file_bytes(key("a", "array of string", strings), key("b", "u8", 7)), PATH)
    assert gguf.metadata["a"] == strings
    assert gguf.metadata["b"] == 7


def test_two_halves_of_a_character_in_neighbouring_strings_are_not_utf8():
    gguf = parse(file_bytes(key("a", "array of string", [b"\xc4", b"\x9f"])), PATH)
    with pytest.raises(FileError, match="entry 0"):
        gguf.metadata["a"]


def test_tensor_data_are_read_only_views_of_the_mapping(sound_file):
    gguf = open_gguf(sound_file)
    data = sound_file.read_bytes()
    for weights in gguf.tensors.values():
        mapping_of(weights)
        assert not weights.data.flags.writeable
        assert weights.data.tobytes() == data[weights.offset : weights.offset + len(weights.data)]


def test_the_mapping_ends_with_the_last_array_that_looks_at_it(sound_file):
    gguf = open_gguf(sound_file)
    weights = gguf.tensors["blk.F32.weight"]
    expected, mapping = weights.to_float32(), weakref.ref(mapping_of(weights))
    gguf.close()
    assert np.array_equal(weights.to_float32(), expected)
    del weights
    assert mapping() is None, "the file stays open after close (Windows could not delete it)"


def test_weights_are_written_into_the_array_that_is_given(sound_file):
    with open_gguf(sound_file) as gguf:
        for weights in gguf.tensors.values():
            if weights.format.dequantize:
                out = np.empty((4, *weights.shape), np.float32)
                assert weights.to_float32(out[1]).base is out
                assert np.array_equal(out[1], weights.to_float32(), equal_nan=True)


def test_a_format_that_is_not_run_can_be_looked_at_but_not_computed_with():
    table = parse(join(file_fields([], [tensor("q", "IQ2_S", 512, 2)])), PATH).tensors["q"]
    assert (table.format.name, table.shape, len(table.data)) == ("IQ2_S", (2, 512), 328)
    with pytest.raises(FileError, match=r"model.gguf: tensor 'q' is IQ2_S, which pocketlm does not run; .*Q4_0"):
        table.to_float32()


@pytest.mark.parametrize("name", ["plain.gguf", "с пробелом и ğ 世界 🌍.gguf"])
@pytest.mark.parametrize("kind", [str, Path])
def test_paths_of_every_kind_open(tmp_path, name, kind):
    (tmp_path / name).write_bytes(file_bytes(key("a", "u8", 1)))
    with open_gguf(kind(tmp_path / name)) as gguf:
        assert gguf.path == tmp_path / name


def test_bytes_after_the_last_tensor_and_a_missing_last_padding_are_no_fault():
    entry = Entry("t", (3,), 0, 0)
    for data in (bytes(12), bytes(13), bytes(32), bytes(1000)):
        assert parse(table_bytes(entry, data=data), PATH).tensors["t"].to_float32().tolist() == [0, 0, 0]
