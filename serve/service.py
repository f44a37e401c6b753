"""A systemd unit for `pocketlm serve`: printed, never installed.

In: the command line, and the model it names, opened. Out: the text of a unit, and what a person should know. Knows no HTTP.

The service runs as a user that exists only while it runs. It sees the system read-only, of the home folders only what it is
started from, and may use the network. MemoryDenyWriteExecute=, a usual line, is missing because the program compiles its
kernels when it starts.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pocketlm.serve.guard import is_loopback
from pocketlm.terminal_text import count

MIB = 1 << 20  # what systemd calls M
BESIDE = 192 * MIB  # Python, the tables of the tokenizer, working memory
NAME = "pocketlm"
SECRETS = "/etc/pocketlm.env"  # the command line of a service can be read by everybody
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))  # by ProtectHome= and PrivateTmp=

UNIT = """\
# /etc/systemd/system/{name}.service
[Unit]
Description=pocketlm: {model}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
EnvironmentFile={secrets}{file}
Environment=XDG_DATA_HOME=%S/{name} POCKETLM_CACHE=%C/{name} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
StateDirectory={name}
CacheDirectory={name}
WorkingDirectory=%S/{name}
UMask=0077
Restart=on-failure
RestartSec=5
TimeoutStopSec=20

# no more memory than the model, {slots} and some working memory take; the processor goes to others first
MemoryMax={memory}M
MemorySwapMax=0
TasksMax=1024
Nice=5
OOMPolicy=stop

# a user that exists while the service runs, and sees little
DynamicUser=yes
ProtectSystem=strict
ProtectHome=tmpfs
{bound}PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateIPC=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectProc=invisible
NoNewPrivileges=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6
{network}LockPersonality=yes
RemoveIPC=yes
CapabilityBoundingSet={capabilities}
AmbientCapabilities={capabilities}
PrivateUsers={users}
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallFilter=setpriority sched_setaffinity
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit(arguments: Any, words: list[str], model: Any) -> str:
    """The unit's text. `words`: the command line behind `pocketlm`."""
    slots, port = arguments.slots, arguments.port
    caches = slots * model.session_bytes(model.n_ctx)
    memory = -(-(model.file_bytes + caches + BESIDE) // MIB)
    program, needed = _program()
    low = 0 < port < 1024  # such a port wants a right that a user of its own has not
    return UNIT.format(
        name=NAME, model=_plain(model.name),
        command=" ".join(_quoted(word) for word in (*program, *_without_key(words, arguments, model.path))),
        secrets="" if _has_key(arguments) else "-", file=SECRETS,
        slots=f"{count(slots, 'conversation')} of {model.n_ctx} tokens", memory=memory,
        network="" if not is_loopback(arguments.host) else "IPAddressDeny=any\nIPAddressAllow=localhost\n",
        bound="".join(f"BindReadOnlyPaths={_path(path)}\n" for path in _hidden([*needed, model.path])),
        capabilities="CAP_NET_BIND_SERVICE" if low else "", users="no" if low else "yes",
    )  # fmt: skip


def how_to(arguments: Any) -> str:
    """Instructions for the user."""
    lines = [f"save this as /etc/systemd/system/{NAME}.service, then: sudo systemctl enable --now {NAME}"]
    if _has_key(arguments):
        lines.append(f"the key goes into {SECRETS}, readable by root alone: POCKETLM_API_KEY=…")
    lines.append(f"POCKETLM_PAGE_TOKEN=… in {SECRETS} is what stands behind the # of the page's address, with every start")
    return "\n".join(lines)


def _has_key(arguments: Any) -> bool:
    return bool(arguments.api_key or os.environ.get("POCKETLM_API_KEY"))


def _program() -> tuple[list[str], list[Path]]:
    """The command that starts this program, and the folders that it needs."""
    found = Path(sys.argv[0]).absolute().parent.resolve() / Path(sys.argv[0]).name
    known = found.name.startswith(NAME) and os.access(found, os.X_OK) and found.is_file()
    program = [str(found)] if known else [sys.executable, "-m", "pocketlm"]
    return program, [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[1]]


def _without_key(words: list[str], arguments: Any, path: Path) -> list[str]:
    """The command line without --install-service and the key, and with the model's path."""
    kept, skip = list[str](), False
    for word in words:
        if skip or word in ("--install-service", "--api-key") or word.startswith("--api-key="):
            skip = not skip and word == "--api-key"
            continue
        kept.append(word)
    if arguments.model in kept:
        kept[kept.index(arguments.model)] = str(path.resolve())
    else:
        kept.insert(1, str(path.resolve()))
    return kept


def _hidden(paths: list[Path]) -> list[Path]:
    """The paths that the service would not see, without repetitions and without those inside another."""
    inside = sorted({path.resolve() for path in paths} | {path.absolute() for path in paths})
    inside = [path for path in inside if any(path.is_relative_to(folder) for folder in HIDDEN)]
    return [path for path in inside if not any(path != other and path.is_relative_to(other) for other in inside)]


def _quoted(word: str) -> str:
    """A word for ExecStart=, with % and $ escaped."""
    word = _plain(word).replace("$", "$$")
    plain = shlex.quote(word) == word
    return word if plain else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _path(path: Path) -> str:
    text = _plain(str(path)).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if " " in text else text.replace(":", "\\:")


def _plain(text: str) -> str:
    """The text on one line, with % escaped."""
    return "".join(character if character.isprintable() else " " for character in text).replace("%", "%%")
