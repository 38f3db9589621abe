"""What an answer must be: requests whose answer alone is known, and answers read as a strict client reads them."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

LOGPROB_TOLERANCE = 1e-3
WORDS = "The cat sat near Monday is a day she felt film story cake how do I bake tell me about number".split()
OPS = ("add", "ablate", "clamp", "mask", "sign_flip")
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
Body = dict[str, Any]


def brief(body: Any) -> str:
    """A body for people: vectors without most of their numbers."""
    if isinstance(body, dict):
        return "{" + ", ".join(f"{key}: {brief(value)}" for key, value in body.items()) + "}"
    if isinstance(body, list) and len(body) > 4 and isinstance(body[0], int | float):
        return f"[{body[0]}, {body[1]}, ... {len(body)}]"
    if isinstance(body, list):
        return "[" + ", ".join(map(brief, body[:8])) + "]"
    return repr(body)[:120]


class Broken(Exception):
    """An answer that no client could read: no JSON, no code, a stream without an end."""


@dataclass(frozen=True)
class Answer:
    """`code`: of a typed error. `texts`, `logprobs`: per choice. `steered`: interventions applied.
    `switched_off`: the token from which on they were not, as the kill switch was set meanwhile."""

    status: int
    code: str | None = None
    texts: tuple[str, ...] = ()
    logprobs: tuple[tuple[float, ...], ...] = ()
    steered: int = 0
    disabled: bool = False
    switched_off: int | None = None
    retry_after: str | None = None

    def same_as(self, other: "Answer") -> bool:
        return self.steered == other.steered and self.same_numbers(other)

    def same_numbers(self, other: "Answer") -> bool:
        """The same texts, and log-probabilities within a thousandth; whatever was done for it."""
        return self.texts == other.texts and len(self.logprobs) == len(other.logprobs) and all(
            _close(mine, theirs) for mine, theirs in zip(self.logprobs, other.logprobs, strict=True))

    def begins_as(self, other: "Answer", tokens: int) -> bool:
        """The first choice has the other's log-probabilities for so many tokens."""
        return _close(self.logprobs[0][:tokens], other.logprobs[0][:tokens])


def _close(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    return len(mine) == len(theirs) and all(abs(a - b) < LOGPROB_TOLERANCE for a, b in zip(mine, theirs, strict=True))


async def ask(http: httpx.AsyncClient, path: str, body: Body) -> Answer:
    """One completion, whole or as a stream.

    Raises:
        Broken: the answer is not one that the API promises.
        httpx.HTTPError: no answer, or half of one.
    """
    if not body.get("stream"):
        response = await http.post(path, json=body)
        return read(response)
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return read(response)
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    if not events or events[-1] != "[DONE]":
        raise Broken(f"a stream ended without [DONE] after {len(events)} events: {events[-1:]}")
    return _streamed([_json(event) for event in events[:-1]])


def read(response: httpx.Response) -> Answer:
    """Any answer of the server that is not a stream."""
    content = _json(response.text)
    if response.status_code >= 400:
        error = content.get("error") if isinstance(content, dict) else None
        if not isinstance(error, dict) or not error.get("code"):
            raise Broken(f"status {response.status_code} without a code: {response.text[:200]!r}")
        return Answer(response.status_code, error["code"], retry_after=response.headers.get("Retry-After"))
    receipt = content.get("steering") or {} if isinstance(content, dict) else {}
    choices = content.get("choices", []) if isinstance(content, dict) else []
    return Answer(response.status_code, None, tuple(_text(choice, "message") for choice in choices),
                  tuple(_logprobs(choice) for choice in choices), len(receipt.get("applied", ())),
                  bool(receipt.get("disabled")), _switched_off(receipt))


def _switched_off(receipt: Mapping[str, Any]) -> int | None:
    """The token of the first choice from which on the kill switch held its steering back."""
    given = receipt.get("switched_off") or [None]
    return given[0]


def _streamed(events: Sequence[Any]) -> Answer:
    texts: dict[int, str] = {}
    logprobs: dict[int, tuple[float, ...]] = {}
    receipt: Mapping[str, Any] = {}
    for event in events:
        if error := event.get("error"):
            if not error.get("code"):
                raise Broken(f"an error event without a code: {error}")
            return Answer(200, error["code"])
        receipt = event.get("steering") or receipt
        for choice in event.get("choices", ()):
            index = choice["index"]
            texts[index] = texts.get(index, "") + _text(choice, "delta")
            logprobs[index] = (*logprobs.get(index, ()), *_logprobs(choice))
    order = sorted(texts)
    return Answer(200, None, tuple(texts[i] for i in order), tuple(logprobs[i] for i in order),
                  len(receipt.get("applied", ())), bool(receipt.get("disabled")), _switched_off(receipt))


def _json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise Broken(f"{constant} in an answer: {text[:200]!r}")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise Broken(f"not JSON: {text[:200]!r}") from error


def _text(choice: Mapping[str, Any], chat_key: str) -> str:
    return (choice.get("text") if chat_key not in choice else choice[chat_key].get("content")) or ""


def _logprobs(choice: Mapping[str, Any]) -> tuple[float, ...]:
    given = choice.get("logprobs") or {}
    if given.get("content"):
        return tuple(entry["logprob"] for entry in given["content"])
    return tuple(given.get("token_logprobs") or ())


@dataclass(frozen=True)
class Innocent:
    """A request that hurts nobody, and its answer alone on an idle server."""

    path: str
    body: Body = field(hash=False)
    alone: Answer | None = None


class Innocents:
    """Draws of requests of every kind: chat and plain, whole and streamed, greedy and seeded, one choice and several,
    unsteered and steered, long prompts and short."""

    def __init__(self, model: str, d_model: int, num_layers: int, seed: int) -> None:
        self.model, self.d_model, self.num_layers = model, d_model, num_layers
        self._random = random.Random(seed)
        self.known: list[Innocent] = []

    def draw(self, max_tokens: int = 8) -> Innocent:
        chance = self._random
        words = " ".join(chance.choices(WORDS, k=chance.choice((3, 8, 40))))
        body: Body = {"model": self.model, "max_tokens": max_tokens, "ignore_eos": True, "stream": chance.random() < .4}
        if chance.random() < 0.5:
            body |= {"temperature": 0}
        else:
            body |= {"temperature": 0.9, "seed": chance.randrange(10**6), "n": chance.choice((1, 1, 3)),
                     **chance.choice(({}, {"top_k": 20}))}
        if chance.random() < 0.6:
            body["steering"] = {"interventions": [self.intervention() for _ in range(chance.choice((1, 1, 2)))]}
        if chance.random() < 0.5:
            return Innocent("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": words}],
                                                     "logprobs": True})
        return Innocent("/v1/completions", {**body, "prompt": words, "logprobs": 1})

    def intervention(self) -> Body:
        chance = self._random
        op = chance.choice(OPS)
        vector = [round(chance.gauss(0, 1), 4) for _ in range(self.d_model)]
        dims = sorted(chance.sample(range(self.d_model), 12))
        kinds: dict[str, Body] = {"mask": {"dims": dims}, "sign_flip": {"dims": dims, "polarity": [1] * 12},
                                  "clamp": {"vector": vector, "value": 2.0}}
        inline = kinds.get(op, {"vector": vector})
        strength: Body = {"strength": {"value": 4.0, "unit": "unit"}} if op == "add" else {}
        return {"op": op, "inline": inline, "site": chance.choice(SITES),
                "layers": [chance.randrange(self.num_layers)],
                "scope": chance.choice(({}, {"prompt": "none"}, {"prompt": {"positions": [-1]}})), **strength}

    async def learn(self, http: httpx.AsyncClient, count: int) -> None:
        """Ask `count` of them, one at a time, on a server that does nothing else."""
        for _ in range(count):
            drawn = self.draw()
            answer = await ask(http, drawn.path, drawn.body)
            if answer.code is not None or not all(answer.texts):
                raise Broken(f"an innocent request alone got {answer}: {drawn.body}")
            self.known.append(replace(drawn, alone=answer))
