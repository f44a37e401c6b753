"""`pocketlm generate --input`: what it takes, how far it is, and what it says at the end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketlm.cli_options import form_keywords, is_packed, open_model, running_keywords, sampling_keywords
from pocketlm.errors import UsageError, whole_number
from pocketlm.terminal_text import StatusLine, clock, count, print

SLOTS = 8
EVERY = 0.5, 30.0  # seconds between two words on how far it is: to a terminal, and to what is not


def arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many prompts")
    group.add_argument("--input", metavar="FILE", help="JSON lines with a prompt or messages each, and sampling fields")
    group.add_argument("--output", metavar="FILE", help="JSON lines with their answers, in order; goes on where it was ended")
    group.add_argument("--slots", type=int, default=SLOTS, metavar="N", help=f"answers at the same time (default {SLOTS})")
    dask = argparse.SUPPRESS if is_packed() else "let the workers of a Dask cluster answer: tcp://…"
    group.add_argument("--dask", metavar="ADDRESS", help=dask)


def run(arguments: argparse.Namespace) -> int:
    """Answer the lines that have no answer yet. Exit status 1 if there are lines and every one of them failed."""
    from pocketlm.serve import left_out

    left_out.stand_in()
    from pocketlm.batch.files import Answers, Prompts
    from pocketlm.batch.local import Settings

    if not arguments.input or not arguments.output:
        raise UsageError("generate: --input FILE and --output FILE belong together")
    if arguments.prompt is not None or arguments.file is not None or arguments.json:
        raise UsageError("generate --input: -p, -f and --json are for a single prompt")
    whole_number("--slots", arguments.slots, 1, 256)
    defaults = {**sampling_keywords(arguments), **form_keywords(arguments), "max_tokens": arguments.max_tokens}
    settings = Settings(arguments.slots, defaults.pop("seed", 0), defaults)
    prompts = Prompts(Path(arguments.input))
    with _machine(arguments, settings) as machine:
        key = prompts.key(machine.made_of, settings.seed, sorted(defaults.items()))
        with Answers(Path(arguments.output), key, prompts.n_lines) as answers:
            with Progress(max(1, prompts.n_lines - prompts.n_blank), answers.n_done, arguments.program) as progress:
                for written in machine.answers(line for line in prompts if line.number not in answers):
                    answers.add(written)
                    progress.step(answers.n_done, written.tokens)
                answers.finish()
            print(progress.result(arguments.output, answers.n_done, answers.n_errors), file=sys.stderr)
    return int(0 < answers.n_errors == answers.n_done)


@contextmanager
def _machine(arguments: argparse.Namespace, settings: Any) -> Iterator[Any]:
    """What answers lines: a model opened here, or the workers of a Dask cluster."""
    from pocketlm.batch.local import Machine

    if arguments.dask:
        try:
            from pocketlm.batch.over_dask import Cluster
        except ImportError:
            raise UsageError("--dask needs Dask, and pocketlm as a package; get it with: pip install distributed") from None
        with Cluster(arguments.dask, arguments.model, running_keywords(arguments), settings) as cluster:
            yield cluster
    else:
        with open_model(arguments) as model:
            yield Machine(model, settings)


class Progress(StatusLine):
    """Progress on stderr: on a terminal one line that is overwritten, else a line now and then. `done`: answered before."""

    def __init__(self, n_lines: int, done: int, program: str):
        self._n_lines, self._before, self._program = n_lines, done, program
        self._began, self._tokens = time.monotonic(), 0
        super().__init__()
        self._next = self._began + EVERY[not self.is_terminal]
        if done:
            print(f"{program}: {done:,} of {n_lines:,} lines are answered already", file=sys.stderr)

    def step(self, done: int, tokens: int) -> None:
        """Show the progress; `done`: lines answered now, `tokens`: of the last answer."""
        self._tokens += tokens
        if (now := time.monotonic()) >= self._next:
            self._next = now + EVERY[not self.is_terminal]
            seconds = now - self._began
            left = clock((self._n_lines - done) * seconds / (done - self._before))
            share, speed = done / self._n_lines, self._tokens / max(seconds, 1e-9)
            text = f"{done:,}/{self._n_lines:,} lines {share:4.0%}  {speed:,.0f} tokens/s  {left} left"
            self.show(text, instead=True)

    def result(self, output: str, done: int, errors: int) -> str:
        """The closing line."""
        seconds = time.monotonic() - self._began
        if 0 < errors == done:
            return f"{output}: none of {done:,} lines could be answered; what is wrong with each stands there"
        failed = f", {errors:,} of them errors" if errors else ""
        speed = f"{count(self._tokens, 'token')} in {clock(seconds)}, {self._tokens / max(seconds, 1e-9):,.0f} tokens/s"
        return f"{output}: {count(done, 'answer')}{failed}; {speed}"
