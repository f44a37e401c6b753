"""The licences of all that a stub is made of, as one text.

In: the files that were fetched, Python's own library, the names of the shared libraries. Out: a text. A part without a licence
is an error, because a stub is for passing on. Knows no archives.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pocketlm.errors import PocketlmError

NAME = "licences.txt"  # in a packed program
_IN_WHEEL = re.compile(r"[^/]+\.dist-info/(licenses/.*[^/]|(LICEN[CS]E|COPYING|NOTICE)[^/]*)")
_CPYTHON_BY = ("panda3d",)  # wheels of which CPython alone is taken
_ZLIB = """\
Copyright (C) 1995-2024 Jean-loup Gailly and Mark Adler

This software is provided 'as-is', without any express or implied warranty. In no event will the authors be held
liable for any damages arising from the use of this software. Permission is granted to anyone to use this software for
any purpose, including commercial applications, and to alter it and redistribute it freely, subject to the following
restrictions: 1. The origin of this software must not be misrepresented; you must not claim that you wrote the
original software. If you use this software in a product, an acknowledgment in the product documentation would be
appreciated but is not required. 2. Altered source versions must be plainly marked as such, and must not be
misrepresented as being the original software. 3. This notice may not be removed or altered from any source
distribution.
"""
_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice
and this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS
PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
_GCC = """\
The runtime libraries of GCC are covered by the GNU General Public License, version 3, with the GCC Runtime Library
Exception, version 3.1: https://www.gnu.org/licenses/gcc-exception-3.1.html. Their source: https://gcc.gnu.org
"""
_MICROSOFT = """\
The runtime libraries of Visual C++: Copyright (C) Microsoft Corporation. They may be redistributed with programs that
use them.
"""
# Libraries that come without a licence file of their own: the beginning of the file's name, in small letters
_LIBRARIES = {
    "libz.": ("zlib", _ZLIB), "zlib": ("zlib", _ZLIB),
    "libffi": ("libffi", "Copyright (c) 1996-2024 Anthony Green, Red Hat, Inc and others.\n\n" + _MIT),
    "libexpat": ("Expat", "Copyright (c) 1998-2000 Thai Open Source Software Center Ltd and Clark Cooper\n"
                 "Copyright (c) 2001-2025 Expat maintainers\n\n" + _MIT),
    "libgcc_s": ("GCC", _GCC), "libstdc++": ("GCC", _GCC),
    "vcruntime": ("Microsoft Visual C++", _MICROSOFT), "msvcp": ("Microsoft Visual C++", _MICROSOFT),
}  # fmt: skip
_PYTHON = re.compile(r"(lib)?python3")


def collect(fetched: Mapping[str, Path], texts: Mapping[str, str], library: Path, libraries: Iterable[str]) -> str:
    """All licences as one text.

    `fetched`: wheels and packages by name; `texts`: licences found in packages; `library`: the folder of Python's own modules;
    `libraries`: the names of the shared libraries in the stub. PocketlmError: something has no licence.
    """
    parts = {"pocketlm": _ours(), **texts}
    for name, path in fetched.items():
        if path.suffix == ".whl" and name not in _CPYTHON_BY:
            if not (found := "\n\n".join(_in_wheel(path))):
                raise PocketlmError(f"{path.name} has no licence in it")
            parts[name] = found
    for file in libraries:
        known = [part for start, part in _LIBRARIES.items() if file.lower().startswith(start)]
        if known:
            parts.setdefault(*known[0])
        elif not (_PYTHON.match(file) or "openblas" in file):  # ours stands in for that
            raise PocketlmError(f"no licence is known of {file}, which a program needs")
    if not any(name.startswith("libpython") for name in parts):
        parts["Python"] = _of_python(library)
    return "\n".join(f"{'=' * 100}\n{name}\n{'=' * 100}\n\n{text.strip()}\n" for name, text in sorted(parts.items()))


def _ours() -> str:
    beside = Path(__file__).parents[1] / "LICENSE"
    text = beside.read_text(encoding="utf-8") if beside.exists() else None
    text = text or importlib.metadata.distribution("pocketlm").read_text("licenses/LICENSE")
    if not text:
        raise PocketlmError("pocketlm's own licence is missing; install it again")
    return text


def _in_wheel(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as file:
        for name in sorted(file.namelist()):
            if _IN_WHEEL.fullmatch(name):
                yield f"({name.partition('/')[2]})\n\n" + file.read(name).decode("utf-8", "replace")


def _of_python(library: Path) -> str:
    """Python's licence: beside its library, in the folder of the program, or where Debian keeps it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = [
        *(folder / name for folder in (library, Path(sys.base_prefix)) for name in ("LICENSE.txt", "LICENSE")),
        Path(os.sep, "usr/share/doc", version, "copyright"), Path(os.sep, "usr/share/licenses", version, "LICENSE"),
    ]  # fmt: skip
    for place in places:
        if place.exists():
            return place.read_text(encoding="utf-8", errors="replace")
    raise PocketlmError(f"Python's licence is not where it belongs, {places[0]}")
