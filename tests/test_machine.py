"""CPU threads of a fit: as asked for, or as many as cores are free."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from threadpoolctl import threadpool_info

from stexp import hardware
from stexp.training import machine as module
from stexp.training import threads
from stexp.training.machine import Machine, free_threads

TRAINER = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "cores", "busy", "threads"),
    [(8, 8, 0, 8), (8, 8, 0.3, 8), (8, 8, 6, 2), (8, 8, 7.9, 1), (8, 8, 14, 1), (2, 64, 3, 2), (2, 64, 63.2, 1)],
)
def test_threads_fit_the_cores_that_are_free(most, cores, busy, threads):
    assert free_threads(most, cores, busy) == threads


@pytest.mark.parametrize(
    ("kind", "devices", "cores", "leaves"),
    [("cpu", [0], 8, False), ("cuda", [0], 4, True), ("cuda", [0], 1, False), ("cuda", [0, 1, 2, 3], 4, False)],
)
def test_a_gpu_leaves_the_cores_that_do_not_drive_it(kind, devices, cores, leaves, monkeypatch):
    monkeypatch.setattr(hardware, "usable_cores", lambda: cores)
    machine = Machine(TRAINER)
    machine.__dict__.update(kind=kind, devices=devices)
    assert machine.leaves_a_core == leaves


@pytest.mark.parametrize(
    ("asked", "environment", "busy", "threads"),
    [(None, None, 0.0, 8), (None, None, 6.0, 2), (5, None, 6.0, 5), (None, "8", 6.0, 8)],
)
def test_what_is_asked_for_is_taken_and_what_others_take_is_said(asked, environment, busy, threads, monkeypatch):
    monkeypatch.setattr(module, "all_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(hardware, "busy_cores", lambda: busy)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    said = Machine(TRAINER, threads=asked).set_threads()
    assert torch.get_num_threads() == threads and said.startswith(f"{threads} CPU thread")
    assert ("6.0 cores busy" in said) == (threads == 2)


def test_linear_algebra_takes_no_more_threads_than_torch():
    for n in (2, 1):
        Machine(TRAINER, threads=n).set_threads()
        taken = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
        assert taken and max(taken) <= n and torch.get_num_threads() == n
    assert max(taken) == 1


def test_several_processes_share_what_is_free(monkeypatch):
    monkeypatch.setattr(module, "all_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(hardware, "busy_cores", lambda: 2.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Machine({"accelerator": "cpu", "devices": 3}).set_threads().startswith("2 CPU threads")


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc/stat")
def test_a_busy_process_is_seen(monkeypatch):
    monkeypatch.setattr(hardware, "_watched_since", None)
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        try:
            other.stdout.readline()
            assert 0.2 < hardware.busy_cores() <= (os.cpu_count() or 1)
        finally:
            other.kill()


def test_this_process_is_none_of_those_that_keep_cores_busy(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(hardware, "core_ticks", lambda: (150, 400))  # 1.5 of four cores are free
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: 12.0)
    monkeypatch.setattr(hardware.time, "process_time", lambda: 8.0)  # 1.2 of them ours
    monkeypatch.setattr(hardware, "_watched_since", hardware.Moment(2.0, -4.0, (0, 0), os.getpid()))
    assert hardware.busy_cores() == pytest.approx(4 - 1.5 - 1.2)


@pytest.mark.parametrize("change", [{"wall": 60}, {"process": 1}])
def test_what_was_watched_long_ago_or_by_another_process_says_nothing_of_now(change, monkeypatch):
    monkeypatch.setattr(hardware, "core_ticks", lambda: (0, 0))
    now, slept = hardware.Moment.now(), []
    old = {key: getattr(now, key) - value for key, value in ({"wall": 1} | change).items()}
    monkeypatch.setattr(hardware, "_watched_since", replace(now, **old))
    monkeypatch.setattr(hardware.time, "sleep", slept.append)
    hardware.busy_cores()
    assert slept == [0.2]


def test_without_proc_the_load_average_counts_without_this_process(monkeypatch):
    monkeypatch.setattr(hardware, "core_ticks", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 0.0, 0.0), raising=False)
    assert hardware.busy_cores(0) == 2.5
    monkeypatch.delattr(os, "getloadavg")
    assert hardware.busy_cores(0) == 0


@pytest.mark.parametrize(
    ("own", "free", "left"),
    [
        (2.0, 0.1, 2),  # half of four cores: lowered to what they got
        (3.5, 0.0, 4),  # nearly all of them
        (2.0, 1.5, 4),  # waiting for tiles, not for cores
        (0.2, 0.0, 1),
        (2.0, None, 4),  # on a system that does not say
    ],
)
def test_threads_are_lowered_where_they_stall_on_a_busy_machine(own, free, left, monkeypatch):
    now = {"wall": 0.0, "own": 0.0}
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(threads.time, "process_time", lambda: now["own"])
    monkeypatch.setattr(hardware, "free_cores", lambda before: free)
    torch.set_num_threads(4)
    callback = threads.LowerThreads(seconds=10)
    callback.on_train_epoch_start(None, None)
    for _ in range(9):
        now["wall"] += 1
        now["own"] += own
        callback.on_train_batch_end(None, None, None, None, 0)
        assert torch.get_num_threads() == 4, "before there is something to judge by"
    now["wall"] += 1
    now["own"] += own
    callback.on_train_batch_end(None, None, None, None, 0)
    assert torch.get_num_threads() == left


def test_idle_cores_are_counted_between_two_moments(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(hardware, "core_ticks", lambda: (150, 1400))
    assert hardware.free_cores((100, 1000)) == pytest.approx(0.5)
    assert hardware.free_cores(None) is None
