"""Nothing but what is asked for goes to the network: whole commands with sockets that are forbidden."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SHORT, demo, environment, prediction

FORBID = """
import socket, sys
def refuse(*arguments, **_):
    print("NETWORK", arguments, file=sys.stderr, flush=True)
    raise OSError("the network is forbidden here")
class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == getattr(socket, "AF_UNIX", None) else refuse(address)
    connect_ex = connect
socket.socket, socket.getaddrinfo, socket.gethostbyname, socket.create_connection = Socket, refuse, refuse, refuse
"""

IN_TURN = """
import importlib, json, sys
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [f"stexp-{name}", *arguments]
    importlib.import_module(f"stexp.cli.{name}").main()
"""


@pytest.mark.slow
def test_train_export_and_predict_open_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FORBID)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    attempt = "import socket; socket.create_connection(('localhost', 9))"
    tried = subprocess.run(
        [sys.executable, "-c", attempt], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert tried.returncode and "NETWORK" in tried.stderr  # what is forbidden is
    model = tmp_path / "model.stexp"
    slide = tmp_path / "demo" / "images" / "A1.jpg"
    commands = (
        ("train", *demo(tmp_path / "demo"), *SHORT, "model=stnet", f"output_dir={tmp_path / 'run'}"),
        ("export", f"run={tmp_path / 'run'}", f"output={model}"),
        ("predict", *prediction(model, slide, tmp_path / "predicted")),
    )
    started = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
    done = subprocess.run(started, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "predicted" / "A1" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which sees sockets of all processes, is not there")
def test_wandb_offline_looks_nothing_up(tmp_path: Path) -> None:
    code = f"""
from stexp.training.loggers import WandbRun
logger = WandbRun({str(tmp_path)!r}, "stexp", "x", mode="offline")
logger.log_metrics({{"m": 1.0}}, step=1)
logger.experiment.finish()
"""
    trace, env = tmp_path / "trace", environment(tmp_path)
    env |= {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("DATA", "CACHE", "CONFIG")}
    arguments = ["strace", "-f", "-e", "trace=connect", "-o", str(trace), sys.executable, "-c", code]
    done = subprocess.run(arguments, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"sa_family=AF_INET6?, .*", trace.read_text())
