"""`trimtab capabilities`: which ops the loaded model takes at which sites."""

from typing import Any

from rich.table import Table

from server.cli.artifacts import AsJson
from server.cli.connection import DEFAULT_URL, Key, Url, connect
from server.cli.console import out, print_json


def capabilities(as_json: AsJson = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Sites and ops that the loaded model offers, as proven when the server started."""
    with connect(url, key) as client:
        found = client.capabilities()
    if as_json:
        print_json(found)
        return
    out.print(f"{found['model']} ({found['family']}, {found['num_layers']} layers, width {found['d_model']}) on "
              f"{found['device']} in {found['dtype']}; fingerprint {found['fingerprint']}", highlight=False)
    table = Table("site", "width", "layers", "ops", box=None)
    for site, offered in found["sites"].items():
        table.add_row(site, str(offered["width"]), ranges(offered["layers"]), " ".join(offered["ops"]))
    out.print(table)
    out.print(massive(found["massive_activations"]), highlight=False)


def massive(told: dict[str, Any] | None) -> str:
    """Massive activations in a sentence."""
    if told is None:
        return "massive activations: not looked for"
    layers = {int(layer): one for layer, one in told["layers"].items()}
    if not layers:
        return f"massive activations: none in {told['texts']} texts"
    dims = sorted({int(dim) for one in layers.values() for dim in (*one["first"], *one["every"])})
    most = max(layers, key=lambda layer: layers[layer]["ratio"])
    return (f"massive activations: after layers {ranges(list(layers))}, dims {', '.join(map(str, dims))}; at layer "
            f"{most} the first position is {layers[most]['first_norm']:.4g} long, others {layers[most]['norm']:.4g}")


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
