"""The command that runs the tests of a GPU says what they said, and never that nothing is well."""

import sys
from pathlib import Path

import pytest
import torch

from scripts import gpu_check

REPORT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>
<testcase name="c"><error/></testcase><testcase name="d"><skipped/></testcase></testsuite></testsuites>"""


def test_outcomes_are_counted_and_a_missing_report_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert gpu_check.counted(tmp_path / "report.xml") == {"passed": 1, "failed": 2, "skipped": 1}
    assert gpu_check.counted(tmp_path / "none.xml") == {"failed": 1}


@pytest.mark.parametrize(("outcomes", "verified", "code", "verdict"), [
    ({"passed": 3, "failed": 0, "skipped": 0, "seconds": 1}, None, 0, "all passed"),
    ({"passed": 3, "failed": 1, "skipped": 0, "seconds": 1}, None, 1, "failed in tests/gpu"),
    # Everything skipped is nothing shown.
    ({"passed": 0, "failed": 0, "skipped": 4, "seconds": 1}, None, 1, "failed in tests/gpu"),
    ({"passed": 3, "failed": 0, "skipped": 0, "seconds": 1}, {"failed": 1}, 1, "failed in verify"),
])
def test_the_verdict(outcomes: dict[str, int], verified: dict[str, int] | None, code: int, verdict: str,
                     monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(gpu_check, "run", lambda name, seconds: gpu_check.Counter(outcomes))
    monkeypatch.setattr(gpu_check, "verify", lambda *given: gpu_check.Counter(verified or {"passed": 1}))
    assert gpu_check.main() == code
    assert f"VERDICT: {verdict}" in capsys.readouterr().out


def test_without_a_gpu_nothing_was_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == gpu_check.NOTHING_CHECKED
    assert "nothing checked" in capsys.readouterr().out
    for name in gpu_check.FILES:
        assert (gpu_check.ROOT / name).exists()
