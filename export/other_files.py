"""What a file or a folder is that holds no checkpoint pocketlm reads, and how to get one: a row for each framework.

In: a path, the first bytes. Out: a FileError to raise, if a row fits. Opens nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import Buffer

NUMPY = "load it with the program that made it, and save the weights as .safetensors or .npz"
OLD_HUB = (
    "turn it into a folder that is read, with transformers 4: from_pretrained({folder!r}, from_%s=True).save_pretrained(…)"
)
DCP = "make one file of its folder: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
BY_NAME = (  # of the file, or of one in the folder → what it is, what to do
    (r"tf_model.*\.h5", "a model for TensorFlow", OLD_HUB % "tf"),
    (r"flax_model.*\.msgpack", "a model for Flax", OLD_HUB % "flax"),
    (r".+\.(keras|h5|hdf5)", "a Keras model or another HDF5 file", NUMPY),
    (r".+\.msgpack", "a model for Flax", NUMPY),
    (r".+\.index|.+\.data-\d+-of-\d+|saved_model\.pb", "a TensorFlow model", NUMPY),
    (r"manifest\.ocdbt|_CHECKPOINT_METADATA", "a checkpoint of JAX's Orbax", NUMPY),
    (r".+\.distcp", "a shard of torch.distributed.checkpoint", DCP),
    (r".+\.onnx", "an ONNX model", "export the checkpoint that it was made from"),
    (r".+\.pt2", "a program of torch.export", "save the model's state_dict() with torch.save"),
)
IN_FOLDERS = (*BY_NAME, (r".+\.gguf", "a GGUF model", "name the file itself"))
BY_BYTES = (  # offset, bytes → what it is, what to do
    (0, b"GGUF", "a GGUF model, not a checkpoint", "name the checkpoint it was made from"),
    (0, b"\x89HDF", "an HDF5 file", NUMPY),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the checkpoint itself", "fetch it with git lfs pull"),
    (257, b"ustar", "a tar archive", "unpack it; a PyTorch checkpoint in tar is from before version 0.4: save it again"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (0, b"Rar!", "a RAR archive", "unpack it first"),
    (0, b"<", "a web page or XML", "download the checkpoint itself"),
)


def other_file(path: Path) -> FileError | None:
    """What a file of this name is, if it is another framework's."""
    found = next((row for row in BY_NAME if re.fullmatch(row[0], path.name)), None)
    return FileError(path, f"is {found[1]}", found[2].format(folder=str(path.parent))) if found else None


def other_bytes(path: Path, buffer: Buffer) -> FileError | None:
    """What a file with these bytes is, if it is a known one."""
    found = next((row for row in BY_BYTES if buffer[row[0] : row[0] + len(row[1])] == row[1]), None)
    return FileError(path, f"is {found[2]}", found[3]) if found else None


def other_folder(folder: Path) -> FileError | None:
    """What a folder, or one in it, holds, if it is another framework's."""
    files = [file for pattern in ("*", "*/*.distcp") for file in folder.glob(pattern)]
    files.sort(key=lambda file: ("optim" in file.parent.name, file))
    for expression, what, advice in IN_FOLDERS:
        if found := next((file for file in files if re.fullmatch(expression, file.name)), None):
            problem = f"holds {what}, {quoted(str(found.relative_to(folder)))}, and no checkpoint that pocketlm reads"
            return FileError(folder, problem, advice.format(folder=str(found.parent)))
    return None
