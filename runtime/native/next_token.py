"""From one pass to the next without Python, as IR: a row's token is drawn, and becomes what its text continues with.

In: the run's record, with a SAMPLER for each row that draws. Out: the stage `sample`, and `follow`, which writes the records of
the next pass. How a token is chosen is draw.py's, who walks the program run_loop.py's.
"""

from __future__ import annotations

from pocketlm.runtime.native.ir import F64, I32, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.record_reader import Records, fill, of_sampler
from pocketlm.runtime.native.records import RUN, SAMPLER, TOKEN, offset

MUCH = 4  # a run ends if more than 1 / MUCH of its time went into waiting for late threads, such as those that had to wake up


def sample(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The stage that draws a row's token where it has a sampler: with the random number of this pass."""
    s = f.load(PTR, r.run("samplers", PTR) + task * 8, 8)
    with f.when(s.differs(0)):
        at, logits = r.run("n_passes") * 8, r.op("x", PTR) + task * r.op("x_stride")
        u = f.load(F64, of_sampler(f, s, "uniforms", PTR) + at, 8)
        id = f.call(I64, "draw", s, logits, of_sampler(f, s, "text", PTR), of_sampler(f, s, "n_text"), u)
        f.store(id, of_sampler(f, s, "drawn", PTR) + at, 8)
        for name in ("logit", "sum"):
            f.store(of_sampler(f, s, name, F64), of_sampler(f, s, name + "s", PTR) + at, 8)


def define(module: Module) -> None:
    """follow(run, elapsed) -> 1 where another pass follows, for which the records now have the tokens just drawn; else 0.

    A token that ends its text, or where none could be drawn, ends the run of all texts. `elapsed`: since the run began, in
    units of its clock.
    """
    with module.function("follow", {"run": PTR, "elapsed": I64}, returns=I64) as (f, run, elapsed):
        r = Records(f, run, run)
        number, samplers = r.run("n_passes"), r.run("samplers", PTR)
        fill(f, RUN, run, n_passes=number + 1)
        with f.when((number + 1 >= r.run("most")) | f.atomic_load(r.run("wanted", PTR)).equals(1)):
            f.ret(0)
        with f.when(f.atomic_load(run + offset(RUN, "lost")) * MUCH > elapsed):
            f.ret(0)  # Python may want to leave the late thread out

        def of(text: Value) -> tuple[Value, Value]:
            """A text's sampler, and the token that it has drawn."""
            sampler = f.load(PTR, samplers + text * 8, 8)
            return sampler, f.field(of_sampler(f, sampler, "drawn", PTR) + number * 8, 0)

        with f.range(0, r.run("n_logits")) as text:
            sampler, id = of(text)
            with f.when(id < 0):
                f.ret(0)
            ends = of_sampler(f, sampler, "ends", PTR)
            with f.range(0, of_sampler(f, sampler, "n_ends")) as i, f.when(f.load(I64, ends + i * 8, 8).equals(id)):
                f.ret(0)
        with f.range(0, r.run("n_logits")) as text:
            sampler, id = of(text)
            token = r.token(text)
            here = r.run("tokens", PTR) + text * TOKEN.itemsize
            fill(f, TOKEN, here, before=token("id"), id=id, position=token("position") + 1)
            end = of_sampler(f, sampler, "n_text")
            f.store(f.cast("trunc", id, I32), of_sampler(f, sampler, "text", PTR) + end * 4, 4)
            fill(f, SAMPLER, sampler, n_text=end + 1)
        f.ret(1)
