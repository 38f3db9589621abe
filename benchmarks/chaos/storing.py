"""Uploads, and the proof that what was acknowledged is still there."""

import json
import random
from dataclasses import dataclass, field

import httpx
import torch
from safetensors.torch import load

from benchmarks.chaos.oracle import Answer, read

NUM_NAMES = 5
DOWNLOADS = 8


@dataclass
class Storing:
    """`acknowledged`: digest and numbers of each version of which a client was told that it is stored."""

    d_model: int
    random: random.Random
    acknowledged: dict[str, tuple[str, list[float]]] = field(default_factory=dict)

    async def store(self, http: httpx.AsyncClient, layers: int = 1) -> Answer:
        """Upload new numbers under one of a few names.

        Raises:
            Broken, httpx.HTTPError: no answer, or one that cannot be read.
        """
        numbers = [round(self.random.gauss(0, 1), 3) for _ in range(self.d_model)]
        response = await http.post("/v1/artifacts", json={
            "metadata": {"name": f"chaos-{self.random.randrange(NUM_NAMES)}", "kind": "vector", "op": "add",
                         "site": "resid_post"},
            "tensors": {str(layer): {"vector": numbers} for layer in range(layers)}})
        answer = read(response)
        if response.status_code == 201:
            stored = response.json()
            self.acknowledged[stored["ref"]] = (stored["digest"], numbers)
        return answer

    async def lost(self, http: httpx.AsyncClient) -> list[str]:
        """What is wrong with what was acknowledged: every digest is compared, and some of the numbers."""
        wrong = []
        found: dict[str, str] = {}
        for name in {ref.partition("@")[0] for ref in self.acknowledged}:
            response = await http.get(f"/v1/artifacts/{name}/versions")
            if response.status_code == 200:
                found |= {each["ref"]: each["digest"] for each in response.json()["data"]}
        for ref, (digest, _) in self.acknowledged.items():
            if found.get(ref) != digest:
                wrong.append(f"{ref} was acknowledged as {digest[:12]} and is {found.get(ref, 'gone')[:12]}")
        for ref in self.random.sample(sorted(self.acknowledged), min(DOWNLOADS, len(self.acknowledged))):
            response = await http.get(f"/v1/artifacts/{ref}/download")
            if response.status_code != 200:
                wrong.append(f"{ref} cannot be read: {response.status_code} {response.text[:100]}")
                continue
            numbers = torch.tensor(self.acknowledged[ref][1])
            if not all(torch.equal(each.float(), numbers) for each in load(response.content).values()):
                wrong.append(f"{ref} holds other numbers")
        return wrong

    async def files(self, http: httpx.AsyncClient) -> list[bytes]:
        """One of the stored versions in each format."""
        ref = next(iter(self.acknowledged))
        return [(await http.get(f"/v1/artifacts/{ref}/download", params={"format": form})).content
                for form in ("safetensors", "gguf")]


def import_query(number: int) -> dict[str, str]:
    return {"metadata": json.dumps({"name": f"mutant-{number % 7}", "kind": "vector", "op": "add",
                                    "site": "resid_post"})}
