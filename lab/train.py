"""Training: `python -m lab.train lab-dense|lab-moe|lab-tools|all`.

AdamW with a one-cycle rate, seeded; a checkpoint every few hundred steps, from which a stopped run
goes on as if it had never stopped. A CUDA device is used where there is one.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lab.batches import CONTEXT_SHARE, SPELLED, Batch, make_batch
from lab.corpus import COPYING_MIX, MIX, ONE_CALL_MIX, TOOLS_MIX
from lab.models import new_model, save_model
from lab.paths import LAB_DIR, MODEL_NAMES, TOOLS_MODEL, model_path
from lab.tokenizer import build_tokenizer

CHECKPOINTS = LAB_DIR.parent / ".lab-checkpoints"


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one corpus mix and one cycle of the learning rate.

    `cycle` is the length of that cycle where it is longer than the phase. `importance` multiplies
    the loss of the answers of single skills. `rows` and `length` stand for those of the recipe where they are given.
    """

    steps: int
    cycle: int
    peak_rate: float
    warm_up: float
    mix: dict[str, float] = field(default_factory=lambda: dict(MIX))
    importance: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    length: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the corpus and the architecture."""

    phases: tuple[Phase, ...]
    rows: int = 24
    length: int = 128
    weight_decay: float = 0.02
    clip: float = 1.0
    balance: float = 0.01
    seed: int = 7
    spelled: float = SPELLED
    context: float = CONTEXT_SHARE
    bf16: bool = False  # matrix products in bf16 (master weights stay fp32): 1.5 x on one core

    @property
    def steps(self) -> int:
        return sum(p.steps for p in self.phases)

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step and the step's number inside it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError("the run has no such step")


# The first phase learns everything but the arithmetic of the calendar: its answers are one token in
# a hundred of what is learned, and weekdays and months stand at chance after 2000 steps. The second
# phase gives single-token answers their due, by share and by weight.
SECOND = dict(
    mix={"chat": 9.0, "sentiment": 9.0, "calendar": 56.0, "tasks": 9.0, "facts": 20.0,
         "languages": 4.0, "emotions": 5.0, "bandit": 5.0, "graph": 6.0, "stories": 3.0},
    importance={"calendar": 5.0, "facts": 3.0, "tasks": 2.0, "emotions": 2.0},
)
# What the second phase left: in lab-dense dates of the kind "the trip is on Monday, the visit is
# three days later", and in both models one review in twenty that changed its mind.
THIRD = dict(
    mix={"chat": 8.0, "sentiment": 34.0, "calendar": 56.0, "tasks": 7.0, "facts": 14.0,
         "languages": 10.0, "emotions": 4.0, "bandit": 5.0, "graph": 9.0, "stories": 6.0},
    importance={"calendar": 8.0, "sentiment": 1.5, "facts": 3.0, "tasks": 2.0, "emotions": 2.0},
)
THIRD_DENSE = dict(
    mix={"chat": 8.0, "sentiment": 32.0, "calendar": 26.0, "dates": 30.0, "tasks": 7.0,
         "facts": 24.0, "languages": 10.0, "emotions": 4.0, "bandit": 5.0, "graph": 9.0,
         "stories": 6.0},
    importance={"calendar": 6.0, "sentiment": 1.5, "facts": 4.0, "tasks": 2.0, "emotions": 2.0},
)
RECIPES = {
    "lab-dense": Recipe((Phase(2600, 4000, 2e-3, 0.1), Phase(1700, 1700, 1.5e-3, 0.1, **SECOND),
                         Phase(700, 700, 1.2e-3, 0.1, **THIRD_DENSE)), bf16=True),
    "lab-moe": Recipe((Phase(2200, 3300, 2e-3, 0.1), Phase(1400, 1400, 1.5e-3, 0.1, **SECOND),
                       Phase(450, 450, 1e-3, 0.1, **THIRD))),
    # Copying first, then single calls, then loops. A word that is spelled in one place and whole in another cannot be
    # copied, so none is spelled. Requests cannot be foretold, and what has to be learned is how they are answered, so
    # context hardly counts.
    TOOLS_MODEL: Recipe((Phase(60, 60, 1.5e-3, 0.1, COPYING_MIX, rows=24, length=96),
                         Phase(120, 120, 2e-3, 0.1, ONE_CALL_MIX, rows=16, length=128),
                         Phase(820, 1000, 2e-3, 0.1, TOOLS_MIX)), rows=4, length=512, spelled=0.0, context=0.05,
                        bf16=True),
}


def loss_of(model: PreTrainedModel, batch: Batch, balance: float) -> torch.Tensor:
    """Mean next-token loss (nats), weighted; for a mixture also the load-balancing term.

    The head runs only where the next token has weight.
    """
    routed = hasattr(model.config, "num_experts")
    out = model.model(
        input_ids=batch.ids, attention_mask=batch.mask(), use_cache=False,
        **({"output_router_logits": True} if routed else {}),
    )
    weight = batch.weight[:, 1:]
    at = (batch.document[:, 1:] == batch.document[:, :-1]) & (weight > 0)
    logits = model.lm_head(out.last_hidden_state[:, :-1][at])
    losses = F.cross_entropy(logits.float(), batch.ids[:, 1:][at], reduction="none")
    loss = (losses * weight[at]).sum() / weight[at].sum()
    if routed:
        used = (batch.document >= 0).long()
        loss = loss + balance * load_balancing_loss_func(
            out.router_logits, model.config.num_experts, model.config.num_experts_per_tok, used
        )
    return loss


def rate_at(step: int, phase: Phase) -> float:
    """Learning rate of a step of a phase: torch's OneCycleLR as a function of the step alone, so
    that a resumed run needs no scheduler state."""
    top = phase.warm_up * phase.cycle - 1
    lowest, last = phase.peak_rate / 25, phase.peak_rate / 25e4
    if step <= top:
        share = step / top
        return lowest + (phase.peak_rate - lowest) * (1 - math.cos(math.pi * share)) / 2
    share = (step - top) / (phase.cycle - 1 - top)
    return last + (phase.peak_rate - last) * (1 + math.cos(math.pi * share)) / 2


def _optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.phases[0].peak_rate, betas=(0.9, 0.98))


def train(
    name: str, recipe: Recipe, checkpoint: Path, every: int = 200, stop_after: int | None = None,
    quiet: bool = False, **changes: object,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train to the end (or to `stop_after` steps) and return the model and a log of the run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = build_tokenizer(name)
    model = new_model(name, recipe.seed, **changes).to(device).train()
    optimizer = _optimizer(model, recipe)
    done, seconds, core_seconds, tokens, smooth = 0, 0.0, 0.0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != _as_plain(recipe):
            raise ValueError(f"{checkpoint} belongs to another recipe; remove it to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds, core_seconds, tokens, smooth = (
            state[k] for k in ("done", "seconds", "core_seconds", "tokens", "smooth"))
    end = min(recipe.steps, stop_after or recipe.steps)
    with _progress(quiet) as bar:
        task = bar.add_task(name, total=recipe.steps, completed=done, loss=smooth)
        while done < end:
            start, core_start = time.monotonic(), time.process_time()
            phase, inside = recipe.phase_at(done)
            batch = make_batch(tok, recipe.seed, done, phase.rows or recipe.rows, phase.length or recipe.length,
                               phase.mix, phase.importance, recipe.spelled, recipe.context).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
                loss = loss_of(model, batch, recipe.balance)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(inside, phase)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            done += 1
            tokens += int((batch.document >= 0).sum())
            smooth = loss.item() if done == 1 else 0.98 * smooth + 0.02 * loss.item()
            seconds += time.monotonic() - start
            core_seconds += time.process_time() - core_start
            bar.update(task, completed=done, loss=smooth)
            if done % every == 0 or done == end:
                _save(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(),
                      recipe=_as_plain(recipe), done=done, seconds=seconds, core_seconds=core_seconds,
                      tokens=tokens, smooth=smooth)
                bar.console.print(f"{name} step {done} loss {smooth:.3f} minutes {seconds / 60:.1f}")
    # Wall time depends on what else the machine does; the time of the cores does not.
    log = {"steps": done, "tokens": tokens, "minutes": round(seconds / 60, 1),
           "core_minutes": round(core_seconds / 60, 1), "loss": round(smooth, 4)}
    return model, log


def _as_plain(recipe: Recipe) -> dict[str, object]:
    """The recipe as JSON has it: what a checkpoint and training.json hold."""
    return json.loads(json.dumps(asdict(recipe)))


def _save(path: Path, **state: object) -> None:
    """Write beside the old checkpoint and rename: a stop while writing loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    torch.save(state, tmp)
    tmp.rename(path)


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(), TimeRemainingColumn(),
        disable=quiet,
    )


def main(
    which: Annotated[str, typer.Argument(help="lab-dense, lab-moe, lab-tools or all")] = "all",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice")] = 0,
) -> None:
    """Train the reference models and write them to lab/models."""
    if threads:
        torch.set_num_threads(threads)
    for name in (*MODEL_NAMES, TOOLS_MODEL) if which == "all" else (which,):
        recipe = RECIPES[name]
        model, log = train(name, recipe, CHECKPOINTS / f"{name}.pt")
        save_model(model, model_path(name), name)
        (model_path(name) / "training.json").write_text(
            json.dumps({**_as_plain(recipe), **log}, indent=2) + "\n"
        )
        typer.echo(f"{name}: {log}")


if __name__ == "__main__":
    typer.run(main)
