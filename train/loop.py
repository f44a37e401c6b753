"""The loop: a model, a corpus and settings in; checkpoints and a log in the run's folder out. Knows no text, but for samples.

A step is a function of the weights, the optimiser's state, the settings and the step's number: which blocks it sees and
which values dropout takes are drawn from (seed, step), so a run that was killed anywhere goes on from its last checkpoint
to the very weights it would have had. Several processes share a step's micro batches; their number does not matter.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.tokenizer import Tokenizer
from pocketlm.train import log
from pocketlm.train.checkpoints import BEST, LAST, read, save
from pocketlm.train.data import Block, Corpus
from pocketlm.train.decoder import Decoder
from pocketlm.train.presets import Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """The processes of one run (torchrun's), and where this one computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the other processes where torchrun started this one. Raises UsageError for a device that is not there."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and size > 1:
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        place = torch.zeros(1, device=kind).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {kind}: {str(error).splitlines()[0][:120]}") from None
    if size > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(int(os.environ.get("RANK", "0")), size, place)
    finally:
        if size > 1:
            dist.destroy_process_group()


def cannot_compile(device: torch.device) -> str:
    """Why torch.compile does not work here (it needs a C++ compiler), "" where it does."""
    factor = random.random()  # so that nothing compiled earlier will do
    try:
        torch.compile(lambda x: x * factor)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compilers under it raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:200]
    return ""


def optimiser(model: Decoder, settings: Settings) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) that decays matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, settings.lr, (0.9, settings.beta2), fused=True)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to min_lr of lr."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    share = min((step - settings.warmup) / max(1, settings.steps - settings.warmup), 1.0)
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


def losses(model: Any, blocks: Sequence[Block], device: torch.device, dtype: str = "fp32") -> torch.Tensor:
    """Sum of the cross-entropies of a micro batch's learnt tokens, in nats."""
    ids, targets, mask = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*blocks, strict=True))
    with torch.autocast(device.type, DTYPES[dtype]) if dtype in DTYPES else nullcontext():
        logits = model(ids)
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (each * mask.flatten()).sum()


def n_learnt(blocks: Sequence[Block]) -> float:
    return float(sum(mask.sum() for _, _, mask in blocks))


@torch.no_grad()
def evaluate(model: Decoder, corpus: Corpus, ranks: Ranks, settings: Settings, n_blocks: int) -> float:
    """Mean loss, in nats, of the first `n_blocks` of a split."""
    model.eval()
    numbers = range(min(n_blocks, corpus.n_blocks()))[ranks.rank :: ranks.size]
    nats = count = 0.0
    for i in range(0, len(numbers), settings.micro_batch):
        blocks = [corpus.block(number) for number in numbers[i : i + settings.micro_batch]]
        nats += float(losses(model, blocks, ranks.device, settings.dtype))
        count += n_learnt(blocks)
    model.train()
    nats, count = ranks.sum(nats, count)
    return nats / max(count, 1.0)


def take_step(
    model: Decoder, compiled: Any, corpus: Corpus, optimizer: torch.optim.Optimizer, scaler: Any, settings: Settings, step: int,
    ranks: Ranks,
) -> float:  # fmt: skip
    """One update from `settings.batch` sequences; their mean loss. The same for any micro batch and number of processes."""
    blocks = corpus.batch(step, settings.batch, settings.seed)
    count = max(1.0, n_learnt(blocks))
    micro = [blocks[i : i + settings.micro_batch] for i in range(0, len(blocks), settings.micro_batch)]
    mine = range(len(micro))[ranks.rank :: ranks.size]
    nats = 0.0
    for number in mine:
        torch.manual_seed(hash((settings.seed, step, number)))  # what dropout draws
        with compiled.no_sync() if ranks.size > 1 and number != mine[-1] else nullcontext():
            loss = losses(compiled, micro[number], ranks.device, settings.dtype)
            scaler.scale(loss * (ranks.size / count)).backward()  # DDP takes the mean over the processes
        nats += float(loss.detach())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return ranks.sum(nats)[0] / count


def train(
    model: Decoder, corpus: Corpus, val: Corpus, settings: Settings, run: Path, ranks: Ranks, *, identity: dict[str, Any],
    sample: Callable[[Decoder], list[str]], log_every: int = 10, eval_every: int = 100, eval_blocks: int = 64,
    save_seconds: float = 60.0,
) -> float:  # fmt: skip
    """Train until `settings.steps`, from the run's last checkpoint where there is one; the last validation loss, in nats.

    `identity`: what the run is made of; a checkpoint that was made otherwise is refused with UsageError. On Ctrl-C or
    SIGTERM the step is finished and saved, and KeyboardInterrupt raised.
    """
    if (n_micro := settings.batch // settings.micro_batch) % ranks.size:
        raise UsageError(f"{n_micro} micro batches a step cannot be shared by {ranks.size} processes")
    model.to(ranks.device).train()
    optimizer, scaler = optimiser(model, settings), torch.amp.GradScaler(ranks.device.type, enabled=settings.dtype == "fp16")
    step, best, val_loss, seconds = 0, math.inf, math.nan, 0.0
    if (run / LAST).exists():
        content = read(run / LAST)
        _check_identity(content["identity"], identity, run)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(content[name])
        step, best, val_loss, seconds = (content[name] for name in ("step", "best", "val_loss", "seconds"))
        _say(ranks, f"going on at step {step} of {settings.steps}")
    compiled: Any = torch.nn.parallel.DistributedDataParallel(model) if ranks.size > 1 else model
    compiled = torch.compile(compiled) if settings.compile else compiled
    if ranks.leads:
        log.rewind(run / log.LOG, step)
    started = time.monotonic() - seconds
    saved = shown_at = time.monotonic()
    shown = step
    with stopping() as stop:
        while step < settings.steps:
            loss = take_step(model, compiled, corpus, optimizer, scaler, settings, step, ranks)
            step, now = step + 1, time.monotonic()
            if not math.isfinite(loss):
                raise PocketlmError(f"the loss is {loss} at step {step}: try a smaller --lr, or --dtype bf16 or fp32")
            is_last = step == settings.steps
            if ranks.leads and (step % log_every == 0 or is_last):
                each = (now - shown_at) / (step - shown)
                row = {"step": step, "loss": loss, "lr": optimizer.param_groups[0]["lr"]}
                row |= {"tokens_per_second": round(settings.batch * corpus.context / each), "seconds": round(now - started, 1)}
                log.write(run / log.LOG, row)
                _say(ranks, log.progress(row, settings.steps, (settings.steps - step) * each))
                shown, shown_at = step, now
            if step % eval_every == 0 or is_last:
                val_loss = evaluate(model, val, ranks, settings, eval_blocks)
                if ranks.leads:
                    if val_loss < best:
                        save(run / BEST, model, step=step, val_loss=val_loss)
                    log.write(run / log.LOG, {"step": step, "val_loss": val_loss, "samples": sample(model)})
                best = min(best, val_loss)
                _say(ranks, f"validation loss {val_loss:.4f} (best {best:.4f})")
                shown_at += time.monotonic() - now
            stopped, due = ranks.sum(len(stop), ranks.leads and now - saved > save_seconds)
            if ranks.leads and (due or stopped or is_last):
                state = {"step": step, "best": best, "val_loss": val_loss, "seconds": now - started, "identity": identity}
                save(run / LAST, model, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), **state)
                saved = now
            if stopped and not is_last:
                _say(ranks, f"stopped at step {step}, which is saved: the same command goes on")
                raise KeyboardInterrupt
    return val_loss


def _say(ranks: Ranks, text: str) -> None:
    if ranks.leads:
        print(text, file=sys.stderr, flush=True)


def _check_identity(old: dict[str, Any], new: dict[str, Any], run: Path) -> None:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            problem = f"{run} holds a run with {name} = {str(old.get(name))[:60]}, not {str(new.get(name))[:60]}"
            raise UsageError(f"{problem}: give that to go on with it, or another folder with -o")


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C or SIGTERM came."""
    got: list[int] = []
    old = {n: signal.signal(n, lambda n, _: got.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def sampler(
    tok: Tokenizer, prompts: Sequence[str], n_tokens: int = 60, temperature: float = 0.7
) -> Callable[[Decoder], list[str]]:
    """What a model makes of the prompts (chat markers are read), always with the same draws; training's are left alone."""
    encoded = [tok.encode(prompt, special=True, bos=tok.adds_bos) or [tok.eos_id or 0] for prompt in prompts]

    @torch.no_grad()
    def sample(model: Decoder) -> list[str]:
        model.eval()
        dice, texts = torch.Generator().manual_seed(1), []
        for prompt in encoded:
            ids: list[int] = []
            while len(ids) < n_tokens and not (ids and ids[-1] in tok.end_ids):
                seen = torch.tensor([(prompt + ids)[-model.shape.n_ctx :]], device=model.tok_emb.weight.device)
                logits = model(seen)[0, -1].float().cpu()
                ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=dice)))
            texts.append(tok.decode(ids))
        model.train()
        return texts

    return sample
