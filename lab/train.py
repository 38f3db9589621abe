"""Training: `python -m lab.train lab-dense|lab-moe|all`.

AdamW with a one-cycle rate, seeded; a checkpoint every few hundred steps, from which a stopped run
goes on as if it had never stopped. A CUDA device is used where there is one.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
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

from lab.batches import Batch, make_batch
from lab.models import new_model, save_model
from lab.paths import LAB_DIR, MODEL_NAMES, model_path
from lab.tokenizer import build_tokenizer

CHECKPOINTS = LAB_DIR.parent / ".lab-checkpoints"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the corpus and the architecture."""

    steps: int
    rows: int = 32
    length: int = 128
    peak_rate: float = 2e-3
    weight_decay: float = 0.02
    warm_up: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    seed: int = 7


RECIPES = {"lab-dense": Recipe(steps=4400), "lab-moe": Recipe(steps=4400)}


def loss_of(model: PreTrainedModel, batch: Batch, balance: float) -> torch.Tensor:
    """Weighted next-token loss (nats); for a mixture also the load-balancing term.

    The head runs only where a next token counts: padding and document ends cost nothing.
    """
    routed = hasattr(model.config, "num_experts")
    out = model.model(
        input_ids=batch.ids, attention_mask=batch.mask(), use_cache=False,
        **({"output_router_logits": True} if routed else {}),
    )
    target, weight = batch.ids[:, 1:], batch.weight[:, 1:]
    inside = (batch.document[:, 1:] == batch.document[:, :-1]) & (weight > 0)
    logits = model.lm_head(out.last_hidden_state[:, :-1][inside])
    losses = F.cross_entropy(logits, target[inside], reduction="none")
    loss = (losses * weight[inside]).sum() / weight[inside].sum()
    if routed:
        used = (batch.document >= 0).long()
        loss = loss + balance * load_balancing_loss_func(
            out.router_logits, model.config.num_experts, model.config.num_experts_per_tok, used
        )
    return loss


def _optimizer(
    model: PreTrainedModel, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.peak_rate, total_steps=recipe.steps, pct_start=recipe.warm_up,
        cycle_momentum=False,
    )
    return optimizer, rate


def train(
    name: str, recipe: Recipe, checkpoint: Path, every: int = 200, stop_after: int | None = None,
    mix: dict[str, float] | None = None, quiet: bool = False, **changes: object,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train to the end (or to `stop_after` steps) and return the model and a log of the run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = build_tokenizer()
    model = new_model(name, recipe.seed, **changes).to(device).train()
    optimizer, rate = _optimizer(model, recipe)
    done, seconds, tokens, smooth = 0, 0.0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} belongs to another recipe; remove it to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rate.load_state_dict(state["rate"])
        done, seconds, tokens, smooth = (state[k] for k in ("done", "seconds", "tokens", "smooth"))
    end = min(recipe.steps, stop_after or recipe.steps)
    with _progress(quiet) as bar:
        task = bar.add_task(name, total=recipe.steps, completed=done, loss=smooth)
        while done < end:
            start = time.monotonic()
            batch = make_batch(tok, recipe.seed, done, recipe.rows, recipe.length, mix).to(device)
            loss = loss_of(model, batch, recipe.balance)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            rate.step()
            done += 1
            tokens += int((batch.document >= 0).sum())
            smooth = loss.item() if done == 1 else 0.98 * smooth + 0.02 * loss.item()
            seconds += time.monotonic() - start
            bar.update(task, completed=done, loss=smooth)
            if done % every == 0 or done == end:
                _save(checkpoint, model, optimizer, rate, recipe, done, seconds, tokens, smooth)
    log = {"steps": done, "tokens": tokens, "minutes": round(seconds / 60, 1), "loss": round(smooth, 4)}
    return model, log


def _save(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer,
          rate: torch.optim.lr_scheduler.LRScheduler, recipe: Recipe, done: int, seconds: float,
          tokens: int, smooth: float) -> None:
    """Write beside the old checkpoint and rename: a stop while writing loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
         "rate": rate.state_dict(), "recipe": asdict(recipe), "done": done, "seconds": seconds,
         "tokens": tokens, "smooth": smooth},
        tmp,
    )
    tmp.rename(path)


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(), TimeRemainingColumn(),
        disable=quiet,
    )


def main(
    which: Annotated[str, typer.Argument(help="lab-dense, lab-moe or all")] = "all",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice")] = 0,
    steps: Annotated[int, typer.Option(help="0 means the recipe's own number")] = 0,
) -> None:
    """Train the reference models and write them to lab/models."""
    if threads:
        torch.set_num_threads(threads)
    for name in MODEL_NAMES if which == "all" else (which,):
        recipe = RECIPES[name]
        if steps:
            recipe = Recipe(**{**asdict(recipe), "steps": steps})
        model, log = train(name, recipe, CHECKPOINTS / f"{name}.pt")
        save_model(model, model_path(name))
        (model_path(name) / "training.json").write_text(
            json.dumps({**asdict(recipe), **log}, indent=2) + "\n"
        )
        typer.echo(f"{name}: {log}")


if __name__ == "__main__":
    typer.run(main)
