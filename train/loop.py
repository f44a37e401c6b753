"""The loop: a model, a corpus and settings in; checkpoints and a log in the run's folder out. Knows no text, but for samples.

A step is a function of the weights, the optimiser's state, the settings, the step's number and what every part of the
corpus has given so far. All of that is in a checkpoint, so a run that was killed anywhere goes on from its last one to
the very weights it would have had. Several processes share a step's micro batches; their number does not matter.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pocketlm.errors import FileError, PocketlmError, UsageError, needed
from pocketlm.runtime.sampling import Sampler, make_sampler
from pocketlm.signals import handled
from pocketlm.tokenizer import Tokenizer
from pocketlm.train import log
from pocketlm.train.batches import Feed
from pocketlm.train.checkpoints import BEST, LAST, keeping, kept, read, save
from pocketlm.train.data import Block, Corpus
from pocketlm.train.decoder import Decoder
from pocketlm.train.devices import AUTOCAST, Ranks
from pocketlm.train.presets import Cadence, Settings


@dataclass
class Progress:
    """How far a run has come. It is saved as it is."""

    step: int = 0
    best: float = math.inf  # validation loss
    since_best: int = 0  # validations
    val_loss: float = math.nan
    seconds: float = 0.0
    rolling: list[int] = field(default_factory=list)  # steps of the numbered checkpoints that newer ones will replace


def optimiser(model: Decoder, settings: Settings) -> Any:
    """AdamW (arXiv:1711.05101) that decays matrices only; its state in 32 bits, or in 8 (arXiv:2110.02861)."""
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        fused = model.tok_emb.weight.device.type != "mps"  # PyTorch 2.4 has none there
        return torch.optim.AdamW(groups, settings.lr, (0.9, settings.beta2), fused=fused)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that are not needed here
    with needed("--optimizer adamw8bit", "bitsandbytes"):
        from bitsandbytes.optim.adamw import AdamW8bit
    on_gpu = model.tok_emb.weight.device.type == "cuda"  # where its state may be moved out of the GPU's memory
    return AdamW8bit(groups, settings.lr, (0.9, settings.beta2), is_paged=on_gpu)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to min_lr."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    lowest = settings.min_lr / settings.lr if settings.min_lr >= 0 else 0.1  # as a share of lr
    share = min((step - settings.warmup) / max(1, settings.steps - settings.warmup), 1.0)
    return settings.lr * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * share)))


def losses(model: Any, blocks: Sequence[Block], device: torch.device, dtype: str = "fp32") -> torch.Tensor:
    """Sum of the cross-entropies of a micro batch's learnt tokens, in nats."""
    ids, targets, mask = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*blocks, strict=True))
    with torch.autocast(device.type, AUTOCAST.get(dtype), dtype in AUTOCAST):
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
    model: Decoder, compiled: Any, feed: Feed, optimizer: torch.optim.Optimizer, scaler: Any, settings: Settings, step: int,
    ranks: Ranks,
) -> float:  # fmt: skip
    """One update from `settings.batch` sequences; their mean loss. The same for any micro batch and number of processes."""
    blocks = feed.batch(step)
    count = max(1.0, n_learnt(blocks))
    micro = [blocks[i : i + settings.micro_batch] for i in range(0, len(blocks), settings.micro_batch)]
    nats = 0.0
    for number in range(len(micro))[ranks.rank :: ranks.size]:
        torch.manual_seed(hash((settings.seed, step, number)))  # what dropout draws
        loss = losses(compiled, micro[number], ranks.device, settings.dtype)
        scaler.scale(loss * (1 / count)).backward()
        nats += float(loss.detach())
    ranks.add_up(weight.grad for weight in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return ranks.sum(nats)[0] / count


def train(
    model: Decoder, compiled: Any, feed: Feed, val: Corpus, settings: Settings, cadence: Cadence, run: Path, ranks: Ranks, *,
    identity: dict[str, Any], sample: Callable[[Decoder], list[dict[str, Any]]], plot: bool = False,
) -> Progress:  # fmt: skip
    """Train until `settings.steps`, or a plateau, from the run's last checkpoint where there is one.

    `compiled`: the model, or what torch.compile made of it. `identity`: what the run is made of; a checkpoint that was made
    otherwise is refused with UsageError. `sample`: what the model says at a validation, some texts for each prompt. On Ctrl-C
    or SIGTERM the step is finished and saved, and KeyboardInterrupt raised.
    """
    if (n_micro := settings.batch // settings.micro_batch) % ranks.size:
        raise UsageError(f"{n_micro} micro batches a step cannot be shared by {ranks.size} processes")
    optimizer = optimiser(model.train(), settings)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.dtype == "fp16")
    measured = [[file, len(ids)] for file, ids in zip(val.files, val.ids, strict=True)]
    at = _resume(run, identity, measured, model, optimizer, scaler, feed)
    if at.step:
        ranks.say(f"going on at step {at.step} of {settings.steps}")
    if ranks.leads:
        log.rewind(run / log.LOG, at.step)
    started = time.monotonic() - at.seconds
    saved = shown_at = time.monotonic()
    shown = at.step

    def ended() -> bool:
        return at.step >= settings.steps or 0 < cadence.patience <= at.since_best

    stop: list[int] = []  # no longer empty once Ctrl-C or SIGTERM came
    with handled((signal.SIGINT, signal.SIGTERM), lambda number, _: stop.append(number)):
        while not ended():
            loss = take_step(model, compiled, feed, optimizer, scaler, settings, at.step, ranks)
            at.step, now = at.step + 1, time.monotonic()
            at.seconds = now - started
            if not math.isfinite(loss):
                raise PocketlmError(f"the loss is {loss} at step {at.step}: try a smaller --lr, or --dtype bf16 or fp32")
            if ranks.leads and (at.step % cadence.log_every == 0 or ended()):
                each = (now - shown_at) / (at.step - shown)
                row = {"step": at.step, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "epoch": round(feed.epochs, 4)}
                row |= {"tokens_per_second": round(settings.batch * settings.context / each), "seconds": round(at.seconds, 1)}
                if ranks.device.type == "cuda":
                    row["gigabytes"] = round(torch.cuda.max_memory_allocated(ranks.device) / 1e9, 3)
                log.write(run / log.LOG, row)
                ranks.say(log.progress(row, settings.steps, (settings.steps - at.step) * each))
                shown, shown_at = at.step, now
            if at.step % cadence.eval_every == 0 or at.step == settings.steps:
                at.val_loss = evaluate(model, val, ranks, settings, cadence.eval_blocks)
                at.since_best = 0 if at.val_loss < at.best else at.since_best + 1
                at.best = min(at.best, at.val_loss)
                if ranks.leads:
                    _note_validation(run, model, at, feed.epochs, sample, ranks)
                    if plot:
                        log.plot(run)
                shown_at += time.monotonic() - now
            stopped, due = ranks.sum(len(stop), ranks.leads and now - saved > cadence.save_seconds)
            if ranks.leads and (due or stopped or kept(at.step, cadence) or ended()):
                with keeping(run, at.step, at.rolling, cadence):
                    state = {"identity": identity, "measured": measured, "position": feed.position, **asdict(at)}
                    save(run / LAST, model, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), **state)
                saved = now
            if stopped and not ended():
                ranks.say(f"stopped at step {at.step}, which is saved: the same command goes on")
                raise KeyboardInterrupt
    return at


def _note_validation(
    run: Path, model: Decoder, at: Progress, epochs: float, sample: Callable[[Decoder], list[dict[str, Any]]], ranks: Ranks
) -> None:
    """Keep the model, where it is the best so far, and what it says."""
    if not at.since_best:
        save(run / BEST, model, step=at.step, val_loss=at.val_loss)
    row = {"step": at.step, "val_loss": at.val_loss, "perplexity": math.exp(min(at.val_loss, 700.0))}
    row |= {"epoch": round(epochs, 4), "samples": sample(model)}
    log.write(run / log.LOG, row)
    for line in log.validation(row, at.best):
        ranks.say(line)


def _resume(
    run: Path, identity: dict[str, Any], measured: list[list[Any]], model: Decoder, optimizer: Any, scaler: Any, feed: Feed
) -> Progress:
    """Bring everything to where the run's last checkpoint was. Raises UsageError for a run of another identity, FileError for
    what no run has saved.
    """
    if not (run / LAST).exists():
        return Progress()
    content = read(run / LAST)
    try:
        return _resumed(run, content, identity, measured, model, optimizer, scaler, feed)
    except (PocketlmError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a damaged or foreign one makes torch raise
        raise FileError(run / LAST, "is no checkpoint that a run can go on from", "choose another folder with -o") from None


def _resumed(
    run: Path, content: dict[str, Any], identity: dict[str, Any], measured: list[list[Any]], model: Decoder, optimizer: Any,
    scaler: Any, feed: Feed,
) -> Progress:  # fmt: skip
    if missing := [name for name in ("identity", "measured", "position", *asdict(Progress())) if name not in content]:
        raise FileError(run / LAST, f"says no {missing[0]}, so no run can go on from it", "choose another folder with -o")
    old = content["identity"]
    if wrong := [name for name in sorted(old.keys() | identity) if old.get(name) != identity.get(name)]:
        given = "; ".join(f"{name} = {old.get(name)}, not {identity.get(name)}" for name in wrong)
        raise UsageError(f"{run} holds a run with {given}: give that to go on with it, or another folder with -o")
    _restore(optimizer, content["optimizer"]["state"])
    model.load_state_dict(content["model"])
    if content["scaler"] and scaler.is_enabled():  # --dtype may change
        scaler.load_state_dict(content["scaler"])
    feed.position = content["position"]
    at = Progress(**{name: content[name] for name in asdict(Progress())})
    if any(type(getattr(at, name)) is not type(value) for name, value in asdict(Progress()).items()) or at.step < 0:
        raise TypeError
    at.rolling = [step for step in at.rolling if isinstance(step, int)]  # from a stranger these would be names of files
    if content["measured"] != measured:  # losses on other texts say nothing about these
        at.best, at.since_best = math.inf, 0
    return at


def _restore(optimizer: Any, saved: dict[int, Any]) -> None:
    """Give an optimiser the state that was saved. Its kernels write as much to that as the weights have, so its tensors are
    those that it makes itself, in a step that moves nothing, and the file's are copied. The weights are to be set afterwards.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    own = optimizer.state_dict()
    optimizer.load_state_dict({**own, "state": _like(own["state"], saved)})


def _like(own: Any, saved: Any) -> Any:
    """`saved`, in the tensors and under the names of `own`. Raises ValueError for other shapes or types."""
    if isinstance(own, dict):
        return {name: _like(value, saved[name]) for name, value in own.items()}
    if type(own) is not type(saved) or getattr(own, "shape", None) != getattr(saved, "shape", None):
        raise ValueError
    return own.copy_(saved) if isinstance(own, torch.Tensor) else saved


def sampler(
    tok: Tokenizer, prompts: Sequence[str], n_each: int = 2, n_tokens: int = 60, temperature: float = 0.8, top_k: int = 40
) -> Callable[[Decoder], list[dict[str, Any]]]:
    """What a model makes of each prompt (chat markers are read), always with the same draws; training's are left alone."""
    encoded = [tok.encode(prompt, special=True, bos=tok.adds_bos) or [tok.eos_id or 0] for prompt in prompts]

    @torch.no_grad()
    def go_on(model: Decoder, prompt: list[int], choose: Sampler) -> str:
        ids: list[int] = []
        while len(ids) < n_tokens and not (ids and ids[-1] in tok.end_ids):
            seen = torch.tensor([(prompt + ids)[-model.shape.n_ctx :]], device=model.tok_emb.weight.device)
            ids.append(choose(model(seen)[0, -1].float().cpu().numpy()[: tok.n_vocab], ids)[0])
        return tok.decode(ids)

    def sample(model: Decoder) -> list[dict[str, Any]]:
        model.eval()
        options = {"temperature": temperature, "top_k": top_k, "top_p": 1.0, "min_p": 0.0, "seed": 1}
        choose = make_sampler(n_vocab=tok.n_vocab, logprobs=False, **options)
        rows = [
            {"prompt": prompt, "texts": [go_on(model, ids, choose) for _ in range(n_each)]}
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]
        model.train()
        return rows

    return sample
