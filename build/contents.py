"""What a stub holds, and what it does without: tables, and nothing else.

Read by what builds stubs, and by tests/frozen_guard.py, which is active in every test: code of a stub that imports something
left out fails there, not on a friend's computer.
"""

from __future__ import annotations

# what of pocketlm a stub holds
PACKAGES = (
    "", "tokenizer", "runtime", "runtime/architectures", "runtime/native", "chat", "constrain", "serve", "batch", "pull",
    "build",
)  # fmt: skip
# what makes a stub and is not in it: the builders of its compiled code, and of itself
BUILDERS = {
    *(f"runtime/native/{name}.py" for name in (
        "amx", "attention", "attention_weights", "cache_numbers", "compiler", "dequantize", "dot", "draw", "elements",
        "experts", "ir", "likeliest", "matrix", "next_token", "record_reader", "run_loop", "softmax", "stages", "vector_math",
    )),
    *(f"build/{name}.py" for name in (
        "contents", "blas", "bytecode", "archive_writer", "compose", "elf", "licences", "macho", "modules", "pe", "sources",
        "wheels",
    )),
}  # fmt: skip
LEFT_OUT = {f"build/{name}.py" for name in ("pack", "tiled_gguf", "command", "archive_reader", "check", "icon")}
LEFT_OUT |= {"batch/over_dask.py", "pull/command.py", "pull/download.py", "pull/hub.py"}
DATA = ("serve/page.html",)  # files that are no code
FROZEN = (  # with all that they import, but for what EXCLUDED names
    "numpy", "jinja2", "markupsafe", "prompt_toolkit", "wcwidth", "regex",
    "starlette", "uvicorn", "h11", "anyio", "typing_extensions", "exceptiongroup",
)  # fmt: skip

# Modules that somebody imports and a conversation never reaches
EXCLUDED = (
    "llvmlite", "torch", "PIL", "yaml", "tarfile", "wcwidth._wcwidth_c",
    "IPython", "pytest", "setuptools", "pkg_resources", "tkinter", "idlelib", "turtle",
    "ssl", "_ssl", "_hashlib", "bz2", "_bz2", "lzma", "_lzma", "_decimal", "fractions", "statistics",
    "multiprocessing", "_multiprocessing", "sqlite3", "readline", "curses", "_curses", "unittest", "doctest", "pdb", "pydoc",
    "xmlrpc", "http.server", "http.cookiejar", "ftplib", "smtplib", "ensurepip", "venv", "distutils", "lib2to3", "test",
    "logging.config", "configparser", "http.client", "email.parser", "email.message", "_pickle", "_pydatetime",
    "optparse", "click", "uvicorn.main", "uvicorn.supervisors", "uvicorn._subprocess", "uvicorn.workers",
    "starlette.testclient", "starlette.templating", "starlette.schemas", "starlette.staticfiles", "anyio.pytest_plugin",
    "anyio._backends._trio", "idna", "sniffio", "_uuid",
    "numpy.random", "numpy.fft", "numpy.polynomial", "numpy.ma", "numpy.f2py", "numpy.testing", "numpy.ctypeslib",
    "numpy.distutils", "numpy._core._multiarray_tests", "numpy._core._umath_tests", "numpy._core._rational_tests",
    "numpy._core._struct_ufunc_tests", "numpy._core._operand_flag_tests", "numpy._core._simd",
    "numpy.char", "numpy.rec", "numpy.strings", "numpy.core", "numpy.matlib", "numpy.typing",
    "prompt_toolkit.contrib", "pygments", "babel",
    "urllib.request", "zipfile", "importlib.metadata", "importlib.resources", "importlib.readers", "concurrent.futures.process",
    "email.policy", "email.generator", "plistlib", "pyexpat", "xml.dom.expatbuilder", "xml.dom.pulldom", "xml.sax",
    "tracemalloc", "compression.zstd", "_zstd",
    "_multibytecodec", "_codecs_cn", "_codecs_hk", "_codecs_iso2022", "_codecs_jp", "_codecs_kr", "_codecs_tw",
    "_wmi",  # Windows is asked for the processor's name, for which there is another way; wine has none
)  # fmt: skip
COMPILED_IN = ("importlib._bootstrap", "importlib._bootstrap_external", "zipimport")  # CPython has their code in itself
# Text encodings that a program in Python's UTF-8 mode can meet; "mbcs" and "oem" are Windows' own
ENCODINGS = (
    "aliases", "ascii", "charmap", "cp1252", "cp437", "idna", "latin_1", "mbcs", "oem", "punycode", "raw_unicode_escape",
    "unicode_escape", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_8", "utf_8_sig",
)  # fmt: skip
# Files of packages that would import much, or hold texts alone, and what stands in their place
REPLACED = {
    "numpy/_core/_add_newdocs.py": "", "numpy/_core/_add_newdocs_scalars.py": "",
    "prompt_toolkit/__init__.py": "from .application import Application\n",  # first: its modules import each other
    "prompt_toolkit/shortcuts/__init__.py": "from .prompt import PromptSession, prompt\n",
    "prompt_toolkit/widgets/__init__.py": "from .base import Frame\n",
    "prompt_toolkit/formatted_text/html.py": "HTML = html_escape = None\n",  # what reads XML
    "prompt_toolkit/key_binding/bindings/vi.py": "from ..key_bindings import KeyBindings as load_vi_bindings\n"
    "load_vi_search_bindings = load_vi_bindings\n",  # none, for who never asks for vi's
    "anyio/__init__.py": """\
from . import abc, to_thread
from ._core._eventloop import get_cancelled_exc_class
from ._core._exceptions import BrokenResourceError, ConnectionFailed, EndOfStream
from ._core._resources import aclose_forcefully
from ._core._synchronization import CancelScope, CapacityLimiterStatistics, EventStatistics, LockStatistics
from ._core._tasks import create_task_group
from ._core._testing import TaskInfo
""",  # it would read its own source to import each only when it is asked for, and without one imports all
}  # fmt: skip
# excluded, and imported all the same: pocketlm.serve.left_out puts something in their place
STOOD_IN = ("ssl", "logging.config", "configparser", "http.client")


def is_excluded(module: str) -> bool:
    """Whether a module, or a package around it, is in EXCLUDED."""
    return any(module == name or module.startswith(f"{name}.") for name in EXCLUDED)


def is_held(source: str) -> bool:
    """Whether a stub holds this file of the package; `source`: its path, such as `chat/repl.py`."""
    return source.rpartition("/")[0] in PACKAGES and source not in BUILDERS | LEFT_OUT
