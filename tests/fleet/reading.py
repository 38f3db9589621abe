"""What replicas say of themselves: metrics, logs, the audit, what they hold."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.cluster import OWNER, Replica
from tests.fleet.load import CHAT

HEADERS = {"Authorization": f"Bearer {OWNER}"}
AUDIT_AT_ONCE = 500


def asked(url: str, **query: Any) -> httpx.Response:
    # Nothing is encrypted here, and to read the certificates of this machine takes longer than to answer.
    return httpx.get(url, headers=HEADERS, params=query, timeout=240, verify=False)


def get(replica: Replica, path: str, **query: Any) -> Any:
    answer = asked(f"{replica.url}{path}", **query)
    assert answer.status_code == 200, f"{replica.name} {path}: {answer.status_code} {answer.text[:300]}"
    return answer.json()


class Metrics:
    """One reading of a replica's metrics."""

    def __init__(self, replica: Replica) -> None:
        text = asked(f"{replica.url}/metrics").text
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all other labels."""
        return sum(sample.value for sample in self._samples
                   if sample.name == name and labels.items() <= sample.labels.items())

    def chats(self) -> dict[int, float]:
        """Answers to chats by status. What is refused before it is routed has no route."""
        found: Counter[int] = Counter()
        for sample in self._samples:
            if sample.name == "trimtab_requests_total" and sample.labels["method"] == "POST" and (
                    sample.labels["route"] in (CHAT, "unmatched")):
                found[int(sample.labels["status"])] += sample.value  # type: ignore[assignment]
        return dict(found)


def logged_chats(replica: Replica) -> dict[int, float]:
    """The same of its access log."""
    return dict(Counter(line["status"] for line in replica.lines("request")
                        if line["method"] == "POST" and line["route"] in (CHAT, "unmatched")))


def audit(replica: Replica) -> list[dict[str, Any]]:
    """All records, oldest first."""
    return list(_pages(replica))


def _pages(replica: Replica) -> Iterator[dict[str, Any]]:
    after = 0
    while page := get(replica, "/v1/audit", after=after, limit=AUDIT_AT_ONCE)["data"]:
        yield from page
        after = page[-1]["number"]


def verified(replica: Replica) -> "subprocess.CompletedProcess[str]":
    """`trimtab audit verify`."""
    return subprocess.run(
        [sys.executable, "-c", "from server.cli import app; app()", "audit", "verify", "--url", replica.url],
        env={**os.environ, "TRIMTAB_API_KEY": OWNER}, capture_output=True, text=True, timeout=240)
