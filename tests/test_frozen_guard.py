"""The guard under which all tests run refuses to a stub's code what stubs do not hold, and to nobody else."""

import importlib
import sys

import numpy as np
import pytest

from pocketlm.build import modules, sources
from pocketlm.build.contents import BUILDERS, EXCLUDED, LEFT_OUT, is_excluded, is_held

pytestmark = pytest.mark.skipif(np.__version__.startswith("1."), reason="stubs hold NumPy 2, and the guard knows its modules")


def run_as(module, code):
    """Run code as if it stood in a module of that name."""
    exec(code, {"__name__": module, **({"__path__": []} if module == "pocketlm.chat" else {})})


REACHING = {
    "an import": "import bz2",
    "an import that was done by others": "import numpy.random",
    "a part of a package": "from numpy import ma",
    "a name in a module": "from numpy.random import default_rng",
    "an attribute of NumPy": "import numpy\nnumpy.random.default_rng(1)",
    "a function of NumPy that reaches further": "import numpy\nnumpy.unique([1, 2])",
    "a function of the standard library": "import importlib\nimportlib.import_module('statistics')",
    "a module in a package that is left out": "import unittest.mock",
    "a name of a package whose names are left out": "from prompt_toolkit import PromptSession",
    "a package that no stub has heard of": "import psutil",
    "the tests' own": "import pytest",
}


@pytest.mark.parametrize("code", REACHING.values(), ids=REACHING.keys())
def test_a_stubs_code_cannot_reach_what_is_left_out(code):
    assert np.random.default_rng(1), "everybody else can"
    for module in ("pocketlm.tokenizer.base", "pocketlm.chat", "pocketlm.model", "pocketlm.runtime.native.executor"):
        with pytest.raises(ImportError, match="in a packed program, where pocketlm"):
            run_as(module, code)


@pytest.mark.parametrize("module", ["pocketlm.export.export", "pocketlm.build.pack", "pocketlm.runtime.native.ir", "other"])
def test_the_senders_code_reaches_everything(module):
    for code in REACHING.values():
        if "psutil" not in code:
            run_as(module, code)
    assert importlib.import_module("statistics") is sys.modules["statistics"]


def test_a_stubs_code_has_the_rest():
    run_as("pocketlm.chat.repl", "import json, numpy, regex, jinja2, prompt_toolkit.shortcuts.prompt, pocketlm.tokenizer.base")
    run_as("pocketlm.chat.repl", "import numpy\nnumpy.linalg.norm([1.0]), numpy.sort([2, 1])")
    run_as("pocketlm.chat.repl", "from prompt_toolkit.shortcuts import PromptSession, utils")


# What the code of a stub asks for and a stub has not: commands that it does not offer, and what makes compiled code
MISSING = {
    "pocketlm.cli": "doctor doctor.health doctor.portrait export export.dialects export.from_model_file",
    "pocketlm.runtime.native.kernels": "runtime.native.compiler runtime.native.ir",
    "pocketlm.batch.command": "batch.over_dask",
}


def test_a_stub_holds_what_its_own_modules_import(tmp_path):
    sources.copy_sources(tmp_path)
    names = [".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in (tmp_path / "pocketlm").rglob("*.py")]
    found = modules.find([name.removesuffix(".__init__") for name in names], [tmp_path], "linux-x86_64", EXCLUDED).nowhere
    missing = {(name, importer) for name, importer in found.items() if name.partition(".")[0] == "pocketlm"}
    assert missing == {(f"pocketlm.{name}", importer) for importer, words in MISSING.items() for name in words.split()}


def test_the_tables_name_files_that_there_are():
    from pathlib import Path

    import pocketlm

    root = Path(pocketlm.__file__).parent
    assert [name for name in sorted(BUILDERS | LEFT_OUT) if not (root / name).is_file()] == []
    assert is_held("chat/repl.py")
    assert not is_held("export/command.py")
    assert not is_held("build/pack.py")
    assert is_excluded("numpy.ma.core")
    assert not is_excluded("numpy.matrixlib")
    assert len({*EXCLUDED}) == len(EXCLUDED)
