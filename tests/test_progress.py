"""Progress: every item once, lines of the log by the clock, a bar on a terminal alone."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from stexp.data import progress as module
from stexp.data.progress import progress, track


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


def test_items_come_as_they_are_and_short_work_shows_nothing(clock, caplog, capsys):
    caplog.set_level(logging.INFO)
    assert list(track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_comes_every_15_seconds(clock, caplog):
    caplog.set_level(logging.INFO)
    for _ in track([[0] * 10] * 10, 100, "cutting", size=len):
        clock[0] += 5
    assert caplog.messages == [f"cutting: {done} of 100" for done in (30, 60, 90)]


def test_amounts_have_their_unit(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress(500, "hashing", "MB") as advance:
        clock[0] = 20
        advance(200)
    assert caplog.messages == ["hashing: 200 of 500 MB"]


def test_a_terminal_gets_a_bar_that_goes_with_an_error_too(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    shown = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=100))
    with pytest.raises(KeyError), progress(10, "cutting") as advance:
        advance(1)
        assert not shown.getvalue()
        clock[0] = 3
        advance(4)
        raise KeyError
    assert "cutting: 5 of 10" in shown.getvalue() and not caplog.records
    assert shown.getvalue().endswith("\x1b[2K")  # wiped away


def test_work_within_work_is_shown_beside_it(clock, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=100))
    with progress(10, "sections") as advance:
        clock[0] = 3
        advance(1)
        with progress(5, "hashing") as inner:
            clock[0] = 6
            inner(2)
            (bar,) = set(module._bars)  # a terminal shows one display
            assert [task.description for task in bar.tasks] == ["sections: 1 of 10", "hashing: 2 of 5"]
        advance(1)
        assert [task.description for task in bar.tasks] == ["sections: 2 of 10"]
    assert module._bars == []
