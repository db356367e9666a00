"""Commands in processes of their own that need not import first: a process that has, forks one for each.

For tests of what a command does. Those of how it starts (imports, variables read by imports, sockets, several devices)
begin it with `subprocess`. A forked command has its own process group, working directory, environment and standard
streams; it meets signals, limits and the end of the interpreter as any other.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn

FREE = ("STEXP_", "WANDB_", "TERM", "COLUMNS", "LINES", "PYTHONPATH", "PYTEST_")
"""Beginnings of the variables that a command may have otherwise than this process: no import reads them."""
LAZY = (
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.TiffImagePlugin"),
    *("hydra._internal.core_plugins.basic_launcher", "omegaconf._impl", "pandas.io.formats.csvs", "s3fs", "scanpy"),
    *("sklearn.random_projection", "torch.utils.serialization.config"),
)
"""What packages import when it is used, and commands use."""


class Process:
    """A command ``[python, "-m", module, *arguments]`` that runs; what tests ask of `subprocess.Popen`.

    Parameters
    ----------
    stdout, stderr
        A file descriptor or open file, `subprocess.PIPE`, `DEVNULL`, for stderr `STDOUT`; none: those of this process.
    largest_file
        Limit of the size of a file, in bytes.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        stdout: int | IO | None = None,
        stderr: int | IO | None = None,
        text: bool = False,
        largest_file: int | None = None,
    ) -> None:
        if list(command[:2]) != [sys.executable, "-m"]:
            raise ValueError(f"{command[:2]}: only modules of this Python are run")
        env = dict(os.environ if env is None else env)
        other = sorted(key for key, _ in set(env.items()) ^ set(os.environ.items()) if not key.startswith(FREE))
        if other:
            raise ValueError(f"{', '.join(other)}: imports read what differs; such a command starts by itself")
        self.args, self.returncode = list(command), None
        self.stdout, out = _stream(stdout, 1, text)
        self.stderr, err = _stream(stderr, 2, text, out)
        self._status, theirs = os.pipe()
        request = {
            "module": command[2],
            "arguments": list(command[3:]),
            "cwd": str(cwd or Path.cwd()),
            "env": env,
            "largest_file": largest_file,
        }
        socket.send_fds(_server(), [json.dumps(request).encode()], [theirs, out, err])
        for fd in {theirs, *([out] if self.stdout else []), *([err] if self.stderr else [])}:
            os.close(fd)
        self.pid = self._number()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, -N after signal N; `subprocess.TimeoutExpired` where it has none in so many seconds."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._number()
            os.close(self._status)
        return self.returncode

    def _number(self) -> int:
        number = os.read(self._status, 4)
        if not number:
            raise RuntimeError("the process that forks has ended; its error stands above")
        return int.from_bytes(number, sys.byteorder, signed=True)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and what it started, if it runs."""
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()
        self.wait()


def begin(command: Sequence[str], *, largest_file: int | None = None, **how: Any) -> Process | subprocess.Popen:
    """A `Process`; where processes do not fork safely, one that begins at the beginning."""
    if sys.platform == "linux":
        return Process(command, largest_file=largest_file, **how)
    limit = None if largest_file is None else functools.partial(limit_files, largest_file)
    return subprocess.Popen(command, start_new_session=True, preexec_fn=limit, **how)


def run(
    command: Sequence[str], *, check: bool = False, capture_output: bool = False, timeout: float = 300, **how: Any
) -> subprocess.CompletedProcess:
    """Run a command to its end, as `subprocess.run` does; the other arguments are those of `Process`."""
    if capture_output:
        how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with begin(command, **how) as process, ThreadPoolExecutor(2) as pool:
        read = [None if each is None else pool.submit(each.read) for each in (process.stdout, process.stderr)]
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        out, err = (None if each is None else each.result() for each in read)
    done = subprocess.CompletedProcess(list(command), status, out, err)
    if check:
        done.check_returncode()
    return done


def _stream(given: int | IO | None, own: int, text: bool, out: int | None = None) -> tuple[IO | None, int]:
    """What is read here of a stream, if anything is, and the file descriptor that the command writes to."""
    if given == subprocess.PIPE:
        end, theirs = os.pipe()
        return open(end, "r" if text else "rb"), theirs
    if given == subprocess.DEVNULL:
        return None, _nowhere()
    if given == subprocess.STDOUT and out is not None:
        return None, out
    return None, own if given is None else given if isinstance(given, int) else given.fileno()


@functools.cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDWR)


@functools.cache
def _server() -> socket.socket:
    """The end here of the socket on which the process that forks takes commands; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def limit_files(size: int) -> None:
    import resource  # of Unix

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# in the process that forks


def serve(ours: socket.socket) -> None:
    """Fork for each request; return in the child, to be the command, or end when no request can come."""
    import_all()
    gc.collect()
    gc.freeze()  # a collection in a child would copy all pages
    while True:
        message, fds, _, _ = socket.recv_fds(ours, 1 << 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            ours.close()
            request = json.loads(message)
            keep_status(request, *fds)
            return
        for fd in fds:
            os.close(fd)
        while reap():
            pass


def reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def import_all() -> None:
    """Import the package, but for its commands, which run as ``__main__``, and for extras that are not installed."""
    import stexp

    places = [path for path in stexp.__path__ if Path(path).name != "cli"]
    for module in pkgutil.walk_packages(places, "stexp.", onerror=lambda _: None):
        if module.name.startswith("stexp.cli"):
            continue
        importlib.import_module(module.name)
    for name in LAZY:
        try:
            importlib.import_module(name)
        except ImportError:  # of an extra that is not installed
            continue


def keep_status(request: dict[str, Any], status: int, out: int, err: int) -> None:
    """Return in a child that is the command, up to its first line; report its end from here."""
    pid = os.fork()
    if pid == 0:
        become(request, status, out, err)
        return
    os.close(out)
    os.close(err)
    write_number(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def write_number(status: int, number: int) -> None:
    os.write(status, number.to_bytes(4, sys.byteorder, signed=True))


def become(request: dict[str, Any], status: int, out: int, err: int) -> None:
    """Take on the streams, folder, variables and arguments of a command."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests were started with &
    write_number(status, os.getpid())
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[0:1] = [request["cwd"], *more]
    sys.argv[1:] = request["arguments"]
    if (limit := request["largest_file"]) is not None:
        limit_files(limit)
    for fd in {status, out, err}:
        os.close(fd)
    global module
    module = request["module"]


def end_as_python_does(module: str) -> NoReturn:
    """Run a module and end with its status, but do not free one by one what all imports made: that takes seconds."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # joins what is not daemonic, executors first, as multiprocessing does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    module = ""
    serve(socket.socket(fileno=int(sys.argv[1])))
    end_as_python_does(module)
