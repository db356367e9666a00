"""Work beside other work: its result, its error, and that nobody waits for it who does not ask."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from stexp.data.parallel import Background


def test_the_result_comes_once_it_is_made_and_the_work_goes_on_meanwhile():
    go, begun = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        assert go.wait(60)
        return threading.get_ident()

    background = Background(work)
    assert begun.wait(60), "it begins before anyone asks"
    go.set()
    assert background.result() == background.result() != threading.get_ident()


def test_its_error_meets_who_asks_for_the_result():
    background = Background(lambda: {}["absent"])
    for _ in range(2):
        with pytest.raises(KeyError, match="absent"):
            background.result()


def test_a_process_ends_without_waiting_for_it():
    code = "import threading; from stexp.data.parallel import Background; Background(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
