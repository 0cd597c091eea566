"""Progress: a bar on a terminal, lines in a log."""

import io
import logging

import pytest

from pipeline import progress
from pipeline.plan import Counts, Plan
from pipeline.progress import Progress


class Terminal(io.StringIO):
    """Standard error that someone looks at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    shown = Progress(Plan(Counts(200)), 100, with_masks=True)
    assert "100/200" in terminal.getvalue()
    shown.show(50, 1234, 3)
    shown.close()
    last = terminal.getvalue().split("\r")[-1]
    assert "150/200" in last
    assert "image/s" in last
    assert "masks/s, 3 failed" in last
    assert caplog.records == []


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress(Plan(Counts(200)), 100, with_masks=True)
    shown.show(50, 1234, 3)
    assert caplog.records == []  # not yet
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    shown.show(50, 1234, 3)
    shown.close()
    [line] = caplog.messages
    assert line.startswith("150/200 images (75.0%), ")
    assert " images/s, " in line
    assert " masks/s, 3 failed, " in line
    assert line.endswith(" min left")
    assert capsys.readouterr().err == ""


def test_embeddings_have_no_masks_and_nothing_done_no_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    Progress(Plan(Counts(10)), 0, with_masks=False).show(0, 0, 0)
    [line] = caplog.messages
    assert line.endswith("images/s, 0 failed, time left unknown")
    assert "masks" not in line
