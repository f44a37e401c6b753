"""Checkpoints as a stranger may make them: pickles that call something, archives and safetensors byte by byte."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketlm.errors import FileError
from pocketlm.export.checkpoint import open_checkpoint

# what published attacks on pickles call: module, name
CALLS = """
os system|posix system|nt system|os popen|os execv|os spawnlp|os posix_spawn|os remove|os.path join|subprocess Popen
subprocess call|subprocess check_output|subprocess run|subprocess getoutput|builtins eval|builtins exec|builtins compile
builtins getattr|builtins setattr|builtins __import__|builtins open|builtins globals|builtins map|builtins apply
builtins print|__builtin__ eval|__builtin__ exec|__builtin__ file|__builtin__ getattr|__builtin__ apply|commands getoutput
runpy _run_code|runpy run_path|runpy run_module|numpy.f2py.crackfortran getlincoef|numpy.f2py.crackfortran _eval_length
numpy.testing._private.utils runstring|numpy.testing._private.utils execfile|numpy load|torch load|torch.hub load
torch.jit load|torch.serialization load|torch.storage _load_from_bytes|torch.utils.collect_env run
torch._dynamo.guards GuardBuilder.get|torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression
torch.utils._config_module ConfigModule.load_config|torch.utils.bottleneck.__main__ run_cprofile
torch.distributed.rpc rpc_sync|pty spawn|webbrowser open|timeit timeit|timeit main|timeit Timer|pickle loads|pickle load
pickle Unpickler|_pickle loads|marshal loads|shelve open|cloudpickle.cloudpickle loads|cloudpickle loads|dill loads
dill._dill _load_type|joblib load|pandas read_pickle|copyreg add_extension|copyreg __newobj__|functools partial
functools reduce|operator attrgetter|operator methodcaller|operator itemgetter|_io open|_io FileIO|io open|io open_code
shutil rmtree|shutil move|socket socket|socket create_connection|ctypes CDLL|ctypes.util find_library|_ctypes dlopen
sys modules.__getitem__|sys setprofile|sys _getframe|cProfile run|cProfile runctx|profile Profile.run|pdb run|bdb Bdb.run
trace Trace.run|code InteractiveInterpreter.runcode|code interact|codeop compile_command
asyncio.unix_events _UnixSubprocessTransport._start|idlelib.pyshell ModifiedInterpreter.runcode
idlelib.run Executive.runcode|idlelib.autocomplete AutoComplete.get_entity|lib2to3.pgen2.grammar Grammar.loads
lib2to3.pgen2.pgen ParserGenerator.make_label|logging.config valid_ident|doctest debug_script|importlib import_module
importlib.machinery SourceFileLoader|imp load_source|pkgutil resolve_name|pip main|pip._internal main|venv create
ensurepip _run_pip|distutils.file_util write_file|multiprocessing.util spawnv_passfds|signal signal|threading Thread
http.server HTTPServer|urllib.request urlopen|requests get|ssl get_server_certificate|ftplib FTP|smtplib SMTP
xmlrpc.client ServerProxy|types CodeType|types FunctionType|_thread start_new_thread|gc get_objects|site execsitecustomize
zipimport zipimporter|uuid _get_command_stdout|aiohttp.client ClientSession|tensorflow.io read_file|keras.models load_model
jinja2 Template
""".replace("\n", "|")
NAMES = [tuple(row.split(" ")) for row in CALLS.split("|") if row]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


ARGUMENT = "touch /tmp/pocketlm-was-here"
# how a pickle can come to call something: a function module, name → the pickle
WAYS: dict[str, Callable[[str, str], bytes]] = {
    "GLOBAL and REDUCE": lambda m, n: b"\x80\x02c" + f"{m}\n{n}\n".encode() + text(ARGUMENT) + b"\x85R.",
    "protocol 0": lambda m, n: f"c{m}\n{n}\n(S'{ARGUMENT}'\ntR.".encode(),
    "STACK_GLOBAL": lambda m, n: b"\x80\x04" + short(m) + short(n) + b"\x93" + short(ARGUMENT) + b"\x85R.",
    "STACK_GLOBAL from the memo": lambda m, n: b"\x80\x04" + short(n) + b"\x940" + short(m) + b"\x940h\x01h\x00\x93)R.",
    "memo overwritten": lambda m, n: b"\x80\x04" + text("torch") + b"q\x05" + text(m) + b"q\x050h\x05" + text(n) + b"\x93)R.",
    "INST": lambda m, n: b"(" + text(ARGUMENT) + f"i{m}\n{n}\n.".encode(),
    "OBJ": lambda m, n: b"(c" + f"{m}\n{n}\n".encode() + text(ARGUMENT) + b"o.",
    "NEWOBJ, then REDUCE": lambda m, n: b"\x80\x02c" + f"{m}\n{n}\n".encode() + b")\x81" + text(ARGUMENT) + b"\x85R.",
    "NEWOBJ, then __setstate__": lambda m, n: b"\x80\x02c" + f"{m}\n{n}\n".encode() + b")\x81" + text(ARGUMENT) + b"b.",
    "behind harmless data": lambda m, n: pickle.dumps({"a": [1] * 50}, 2)[:-1] + b"0c" + f"{m}\n{n}\n".encode() + b")R0}.",
    "in a tensor's arguments": lambda m, n: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(c" + f"{m}\n{n}\n".encode() + text(ARGUMENT) + b"\x85RK\x00))N}tR."
    ),
    "as a tensor's function": lambda m, n: (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c" + f"{m}\n{n}\n".encode() + b"N" + text(ARGUMENT) + b"\x85}tR."
    ),
}


def torch_zip(pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch.save lays one out."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("ckpt/data.pkl", pickled)
        archive.writestr("ckpt/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"ckpt/data/{key}", data)
        archive.writestr("ckpt/version", "3\n")
    return file.getvalue()


def refused(path: Path, content: bytes) -> str:
    """The one line that reading `content` ends with."""
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


TENSOR = (
    b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
    + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89}tRs."
)  # fmt: skip
VALUES = np.arange(6, dtype="<f4")
SOUND = torch_zip(TENSOR, {"0": VALUES.tobytes()})


def safetensors(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(packed) if length is None else length) + packed + data


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
