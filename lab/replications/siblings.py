"""Relatives of lab-dense for which nothing was fitted: one trained on from its weights, one from another seed.

Both are trained when they are first asked for, in minutes of a core, and kept beside the checkpoints of `lab.train`.
The
second seed has a twentieth of lab-dense's training and less of its calendar: enough to write reviews and sentences.
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedModel

from lab.batches import make_batch
from lab.models import load_model
from lab.paths import model_path
from lab.tokenizer import build_tokenizer
from lab.train import CHECKPOINTS, Phase, Recipe, loss_of, rate_at, train
from steering.models.describe import model_facts
from steering.models.fingerprints import fingerprint
from vectors.extract.local import LocalSubject

NAME = "lab-dense"
MIX = {"sentiment": 30.0, "languages": 24.0, "chat": 10.0, "emotions": 8.0, "stories": 8.0, "facts": 6.0, "tasks": 6.0,
       "calendar": 6.0, "bandit": 2.0, "graph": 2.0}
SEED = Recipe((Phase(320, 320, 2.5e-3, 0.1, MIX),), rows=16, seed=11)
TUNED_MIX = {"stories": 40.0, "emotions": 20.0, "languages": 20.0, "sentiment": 20.0}
TUNED = Recipe((Phase(80, 80, 1e-3, 0.1, TUNED_MIX),), rows=16, seed=13)
SIBLINGS = ("fine-tune", "second seed")


def sibling(kind: str) -> LocalSubject:
    """A member of SIBLINGS, in float32 on the CPU."""
    if kind == "fine-tune":
        model = _tuned()
    else:
        model, _ = train(NAME, SEED, CHECKPOINTS / "second-seed.pt", every=100, quiet=True)
    model = model.float().cpu().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path(NAME))
    facts = model_facts(model, model_id=f"lab-dense, {kind}", fingerprint=fingerprint(model))
    return LocalSubject(model, tokenizer, facts)


def _tuned() -> PreTrainedModel:
    path = CHECKPOINTS / "fine-tune.pt"
    model = load_model(model_path(NAME))
    if path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model
    model.train()
    tokenizer = build_tokenizer(NAME)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=TUNED.weight_decay)
    [phase] = TUNED.phases
    for step in range(TUNED.steps):
        batch = make_batch(tokenizer, TUNED.seed, step, TUNED.rows, TUNED.length, phase.mix, phase.importance,
                           TUNED.spelled, TUNED.context)
        loss = loss_of(model, batch, TUNED.balance)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, phase)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TUNED.clip)
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model
