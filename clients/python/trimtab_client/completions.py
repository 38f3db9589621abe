"""Requests for completions: whole and streamed, chat and plain."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from trimtab_client.errors import refusal
from trimtab_client.flow import Answer, Call, Flow, Stream
from trimtab_client.models import Completion, Delta, Receipt, Usage
from trimtab_client.reading import plain, reader

Steering = str | Sequence[str] | Mapping[str, Any] | None
"""A reference ("cheerful", "cheerful@3"), several, the full `steering` object, or None for none."""

Messages = str | Sequence[Mapping[str, Any]]
"""A conversation, or a single user message as a string."""


def models() -> Call[list[str]]:
    """Names that can be asked for: the base model first, then one per preset."""
    return Call("GET", "/v1/models", lambda answer: [entry["id"] for entry in json.loads(answer.content)["data"]])


def chat(messages: Messages, *, steering: Steering = None, model: str | None = None, **fields: Any
         ) -> Flow[Completion]:
    """A chat completion. model: by default the server's base model. fields: any other of the API, max_tokens say."""
    body = yield from _body(steering, model, fields)
    found: Completion = yield Call("POST", "/v1/chat/completions", _read_chat,
                                   json={"messages": _messages(messages), **body})
    return found


def complete(prompt: str | Sequence[int], *, steering: Steering = None, model: str | None = None, **fields: Any
             ) -> Flow[Completion]:
    """A continuation of plain text or token ids. fields: any other of the API, max_tokens say."""
    body = yield from _body(steering, model, fields)
    found: Completion = yield Call("POST", "/v1/completions", _read_plain, json={"prompt": prompt, **body})
    return found


def stream_chat(messages: Messages, *, steering: Steering = None, model: str | None = None, **fields: Any
                ) -> Flow[Stream[Delta]]:
    """The same as `chat`, piece by piece; the last piece carries the receipt."""
    body = yield from _body(steering, model, fields)
    return Stream("POST", "/v1/chat/completions", _read_event,
                  json={"messages": _messages(messages), **body, "stream": True})


def stream_complete(prompt: str | Sequence[int], *, steering: Steering = None, model: str | None = None, **fields: Any
                    ) -> Flow[Stream[Delta]]:
    """The same as `complete`, piece by piece; the last piece carries the receipt."""
    body = yield from _body(steering, model, fields)
    return Stream("POST", "/v1/completions", _read_event, json={"prompt": prompt, **body, "stream": True})


def receipts(*, artifact: str | None = None, limit: int = 50) -> Call[dict[str, Any]]:
    """Lines of the receipts that are kept, newest first: `{"data": [...]}`."""
    return Call("GET", "/v1/receipts", plain, params={"artifact": artifact, "limit": limit})


def receipt(request_id: str) -> Call[Receipt]:
    """The receipt of a finished request, by the id of its answer; it is kept for some minutes only."""
    return Call("GET", f"/v1/receipts/{quote(request_id, safe='')}", reader(Receipt))


def respond(input: str | Sequence[Mapping[str, Any]], *, steering: Steering = None, model: str | None = None,
            **fields: Any) -> Flow[dict[str, Any]]:
    """A turn of a conversation that the server may store, as OpenAI's /v1/responses writes it. fields: any other of the
    API, `previous_response_id` to go on from one."""
    body = yield from _body(steering, model, fields)
    found: dict[str, Any] = yield Call("POST", "/v1/responses", plain, json={
        "input": input if isinstance(input, str) else [dict(item) for item in input], **body})
    return found


def response(response_id: str) -> Call[dict[str, Any]]:
    """A stored response."""
    return Call("GET", f"/v1/responses/{quote(response_id, safe='')}", plain)


def delete_response(response_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/responses/{quote(response_id, safe='')}", lambda answer: None)


def cancel_response(response_id: str) -> Call[dict[str, Any]]:
    """End a response that is being written."""
    return Call("POST", f"/v1/responses/{quote(response_id, safe='')}/cancel", plain)


def tokenize(text: Messages | None = None, *, prompt: str | None = None) -> Call[list[int]]:
    """Tokens that a chat has with these messages, or that a completion has with this prompt."""
    body = {"prompt": prompt} if text is None else {"messages": _messages(text)}
    return Call("POST", "/v1/tokenize", lambda answer: list(json.loads(answer.content)["tokens"]), json=body)


def token_texts(text: Messages | None = None, *, prompt: str | None = None) -> Call[list[tuple[int, str, str | None]]]:
    """Id, text and, in a chat, the role of the turn of each token; special ones are spelt by their name."""
    body = {"prompt": prompt} if text is None else {"messages": _messages(text)}

    def read(answer: Answer) -> list[tuple[int, str, str | None]]:
        found = json.loads(answer.content)
        roles = found.get("token_roles") or [None] * len(found["tokens"])
        return list(zip(found["tokens"], found["token_strs"], roles, strict=True))

    return Call("POST", "/v1/tokenize", read, json={**body, "return_token_strs": True, "return_token_roles": True})


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """The text of some tokens, special ones by their name."""
    return Call("POST", "/v1/detokenize", lambda answer: str(json.loads(answer.content)["prompt"]),
                json={"tokens": list(tokens)})


def _body(steering: Steering, model: str | None, fields: Mapping[str, Any]) -> Flow[dict[str, Any]]:
    if model is None:
        model = (yield models())[0]
    wanted = {} if steering is None else {"steering": steering_field(steering)}
    return {"model": model, **wanted, **fields}


def steering_field(steering: str | Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The `steering` object for what the methods take."""
    if isinstance(steering, Mapping):
        return dict(steering)
    names = [steering] if isinstance(steering, str) else steering
    return {"interventions": [{"artifact": name} for name in names]}


def _messages(messages: Messages) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]


def _read_chat(answer: Answer) -> Completion:
    body = json.loads(answer.content)
    return _completion(body, [choice["message"]["content"] for choice in body["choices"]])


def _read_plain(answer: Answer) -> Completion:
    body = json.loads(answer.content)
    return _completion(body, [choice["text"] for choice in body["choices"]])


def _completion(body: dict[str, Any], texts: list[str]) -> Completion:
    choices = [{"index": choice["index"], "text": text, "finish_reason": choice["finish_reason"],
                "logprobs": choice.get("logprobs")} for choice, text in zip(body["choices"], texts, strict=True)]
    return Completion.model_validate({**body, "choices": choices})


def _read_event(data: bytes) -> Delta:
    body = json.loads(data)
    if "error" in body:
        # The status was sent before it failed; a stream has no other place to say so.
        raise refusal(500, body, None)
    choice = body["choices"][0] if body["choices"] else {}
    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
    usage, receipt = body.get("usage"), body.get("steering")
    return Delta(text=text, index=choice.get("index", 0), finish_reason=choice.get("finish_reason"),
                 usage=None if usage is None else Usage.model_validate(usage),
                 steering=None if receipt is None else Receipt.model_validate(receipt))
