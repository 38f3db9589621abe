"""inspect-ai: an evaluation through its provider for servers of OpenAI's API."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.clients.real.conftest import STEERING


def test_an_evaluation(drive: Callable[..., Any], tmp_path: Path) -> None:
    plain, steered = (drive("inspect", "inspect_eval.py", json.dumps(steering), str(tmp_path / str(number)))
                      for number, steering in enumerate((None, STEERING)))
    assert all(a != b for a, b in zip(plain["answers"], steered["answers"], strict=True))
    assert len(steered["scores"]) == 3
    assert all(receipt["applied"][0]["tokens"]["prompt"] > 0 for receipt in steered["receipts"])
    assert not any(receipt and receipt["applied"] for receipt in plain["receipts"])
