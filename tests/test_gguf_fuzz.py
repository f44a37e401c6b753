"""Damaged GGUF files by the thousand, and every way of cutting one off."""
import subprocess
import sys
from pathlib import Path

import fuzz_gguf
import pytest
from gguf_bytes import join

from pocketlm.errors import FileError
from pocketlm.runtime.gguf_reader import open_gguf, parse

PATH = Path("model.gguf")


def test_20000_mutated_files_open_or_are_refused_quickly_and_in_little_memory():
    # In a process of its own: a read outside the mapping would end it, and its peak memory is that of the reader alone
    run = subprocess.run([sys.executable, fuzz_gguf.__file__, "--count", "20000"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("fields", fuzz_gguf.SEEDS, ids=["everything", "aligned to 64", "vocabulary", "plain"])
def test_a_file_cut_at_any_byte_of_its_header_does_not_open(fields):
    data = join(fields)
    gguf = parse(data, PATH)
    without_padding = len(join([field for field in fields if field.kind != "padding"]))
    for n_bytes in range(min((tensor.offset for tensor in gguf.tensors.values()), default=without_padding)):
        with pytest.raises(FileError):
            parse(data[:n_bytes], PATH)


@pytest.mark.parametrize("fields", [f for f in fuzz_gguf.SEEDS if any(field.kind == "data" for field in f)])
def test_a_file_cut_around_a_tensor_boundary_opens_only_if_all_data_are_there(fields, tmp_path):
    data = join(fields)
    extents = [(tensor.offset, tensor.offset + len(tensor.data)) for tensor in parse(data, PATH).tensors.values()]
    end = max(stop for _, stop in extents)
    for boundary in {place for extent in extents for place in extent}:
        for n_bytes in (boundary - 1, boundary, boundary + 1):
            (tmp_path / "cut.gguf").write_bytes(data[:n_bytes])
            if n_bytes >= end:
                open_gguf(tmp_path / "cut.gguf").close()
            else:
                with pytest.raises(FileError, match="the file is cut short"):
                    open_gguf(tmp_path / "cut.gguf")
