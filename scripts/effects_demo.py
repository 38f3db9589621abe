"""500 requests over six presets, and what they did: `python -m scripts.effects_demo [--url URL] [--picture FILE]`.

Against a running server with the bundled library, or one of its own. Every request asks for its effects, so every one
is measured. Prints GET /v1/effects, checks that /metrics says the same, and draws docs/effects-demo.png and .svg.
"""

import argparse
import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from trimtab_client import AsyncClient

from scripts.bundled_library import FOLDER, MODEL
from scripts.running import running_server
from server.observability.logs import configure_logging

REQUESTS = 500
CONCURRENT = 24
MAX_TOKENS = 24
PICTURE = Path(__file__).parent.parent / "docs" / "effects-demo"
PRESETS: dict[str, list[dict[str, Any]]] = {
    "demo-cheerful": [{"artifact": "cheerful"}],
    "demo-gloomy": [{"artifact": "cheerful", "strength": {"kl": -0.3}}],
    "demo-faintly-cheerful": [{"artifact": "cheerful", "strength": {"kl": 0.1}}],
    "demo-unfiltered": [{"artifact": "refusal"}],
    "demo-french": [{"artifact": "french"}],
    "demo-cheerful-french": [{"artifact": "cheerful"}, {"artifact": "french"}],
}
PROMPTS = ("Review: I visited the museum on Monday.", "My review of the hotel: I slept at it on Friday.", "3 / 4:",
           "How do I bake bread?", "Review of a concert. I saw it with my team on Sunday.")
# Columns of GET /v1/effects, and the series of /metrics that sum to them, with their signs.
SAME = {"kl_mean": {"trimtab_effect_kl_nats_sum": 1}, "top1_changed": {"trimtab_effect_top1_changed_sum": 1},
        "entropy_change": {"trimtab_effect_entropy_raised_nats_total": 1,
                           "trimtab_effect_entropy_lowered_nats_total": -1}}
COUNT = "trimtab_effect_kl_nats_count"
Key = tuple[str, str, str]
Sums = dict[Key, tuple[float, ...]]


@asynccontextmanager
async def server(url: str | None) -> AsyncIterator[str]:
    if url is not None:
        yield url
        return
    async with running_server(MODEL, slots=64, slot_wait_s=600) as own, AsyncClient(own) as client:
        for file in sorted(FOLDER.glob("*.safetensors")):
            await client.import_artifact(file.read_bytes())
        yield own


async def drive(client: AsyncClient, presets: Mapping[str, str]) -> None:
    """presets: name to reference."""
    gate = asyncio.Semaphore(CONCURRENT)
    names = list(presets)

    async def one(number: int) -> None:
        prompt = PROMPTS[number // len(names) % len(PROMPTS)]
        ask = client.chat if prompt.endswith("?") else client.complete
        async with gate:
            answer = await ask([{"role": "user", "content": prompt}] if prompt.endswith("?") else prompt,  # type: ignore[arg-type]
                               model=f"{MODEL}:{names[number % len(names)]}", max_tokens=MAX_TOKENS, temperature=1.0,
                               seed=number, steering={"report": "summary"})
        if (answer.steering.effects or {}).get("status") != "measured":
            raise RuntimeError(f"request {number} was not measured: {answer.steering.effects}")

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))


async def from_database(client: AsyncClient, presets: Mapping[str, str]) -> Sums:
    """Completions, and sums over them, by (preset, artifact, op)."""
    found: Sums = {}
    for ref in presets.values():
        for row in (await client.effects(group="all", preset=ref, limit=1000))["data"]:
            count = float(row["completions"])
            found[row["preset"], row["artifact"], row["op"]] = (count, *(row[name] * count for name in SAME))
    return found


async def from_metrics(url: str, presets: Mapping[str, str]) -> Sums:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        text = (await http.get("/metrics")).text
    series: dict[tuple[str, Key], float] = {}
    for name, labels, value in re.findall(r"^(trimtab_effect_\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if "le" not in known and "artifact" in known and known["preset"] in presets.values():
            series[name, (known["preset"], known["artifact"], known["op"])] = float(value)
    keys = {key for _, key in series}
    return {key: (series[COUNT, key], *(sum(sign * series[name, key] for name, sign in parts.items())
                                        for parts in SAME.values())) for key in keys}


def less(after: Sums, before: Sums) -> Sums:
    zero = (0.0,) * (1 + len(SAME))
    return {key: tuple(a - b for a, b in zip(sums, before.get(key, zero), strict=True))
            for key, sums in after.items()}


def check_same(database: Sums, metrics: Sums) -> None:
    """Raises RuntimeError: the two disagree."""
    if set(database) != set(metrics):
        raise RuntimeError(f"rows of one side only: {set(database) ^ set(metrics)}")
    for key, sums in database.items():
        for name, ours, theirs in zip(("completions", *SAME), sums, metrics[key], strict=True):
            if abs(ours - theirs) > 1e-6 * max(1.0, abs(theirs)):
                raise RuntimeError(f"{key} {name}: /v1/effects {ours}, /metrics {theirs}")


def shown(rows: list[dict[str, Any]]) -> Table:
    table = Table("preset", "artifact", "op", "completions", "KL mean", "p50", "p95", "top-1 changed", "entropy",
                  "repeats", title="GET /v1/effects", box=None)
    for row in rows:
        table.add_row(row["preset"], row["artifact"], row["op"], str(row["completions"]), f"{row['kl_mean']:.3f}",
                      f"{row['kl_p50']:.3f}", f"{row['kl_p95']:.3f}", f"{row['top1_changed']:.1%}",
                      f"{row['entropy_change']:+.3f}", f"{row['repetition']:.1%}")
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Whole specs, and beside them the share of each intervention, as `GET /v1/effects` tells them."""
    order = list(dict.fromkeys(row["preset"] for row in rows))
    rows = sorted(rows, key=lambda row: (order.index(row["preset"]), row["artifact"] != "all", row["artifact"]))
    names = [row["preset"] if row["artifact"] == "all" else f"   {row['artifact']}" for row in rows]
    colors = ["#1f6fb4" if row["artifact"] == "all" else "#9cc3e0" for row in rows]
    figure = Figure(figsize=(12.5, 0.36 * len(rows) + 1.4), layout="constrained", dpi=120)
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"kl_mean": "KL per token (nats): mean, p50 |, p95 +", "top1_changed": "likeliest token changed",
              "entropy_change": "change of entropy (nats)"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        axes.barh(range(len(rows)), [row[column] for row in rows], color=colors, height=0.7)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for mark, column in (("|", "kl_p50"), ("+", "kl_p95")):
        panels[0].plot([row[column] for row in rows], range(len(rows)), mark, color="#222222", markersize=9)
    panels[0].set_yticks(range(len(rows)), names, fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(f"{REQUESTS} requests over {len(order)} presets on {MODEL}: whole specs (dark), and each "
                    "intervention against the spec without it (light)", fontsize=10)
    for end in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{end}"), metadata={"Date": None} if end == "svg" else {"Software": None})


async def main(url: str | None, picture: Path) -> None:
    configure_logging("console")
    console = Console(width=160)
    async with server(url) as where, AsyncClient(where) as client:
        presets = {name: (await client.create_preset(name, {"interventions": spec})).ref
                   for name, spec in PRESETS.items()}
        before = await from_database(client, presets), await from_metrics(where, presets)
        await drive(client, presets)
        after = await from_database(client, presets), await from_metrics(where, presets)
        database, metrics = less(after[0], before[0]), less(after[1], before[1])
        check_same(database, metrics)
        total = sum(sums[0] for key, sums in database.items() if key[1] == "all")
        rows = [row for ref in presets.values()
                for row in (await client.effects(group="all", preset=ref, limit=1000))["data"]]
        console.print(shown(rows))
        console.print(f"{total:.0f} completions measured; {len(database)} rows, /metrics says the same of each")
        draw(rows, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=None, help="a running server; by default one of its own")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.url, arguments.picture))
