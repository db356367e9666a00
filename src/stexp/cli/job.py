"""A command as a job of a sweep: it ends with the process that started it, and records why it failed."""

from __future__ import annotations

# nothing else is imported before the process is tied to its parent
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""


def tie_to(parent: int) -> None:
    """End this process with its parent, even where that is killed.

    Everywhere a thread reads standard input, a pipe that closes with the parent; on Linux the kernel itself ends the
    process, whatever its threads are at. A parent that was gone before either took hold is seen by its id.
    """
    threading.Thread(target=_end_with_pipe, daemon=True).start()
    if sys.platform == "linux":
        import ctypes  # some milliseconds that other systems need not wait for

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)


def _end_with_pipe() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def main(logs: str, command: str, arguments: list[str]) -> None:
    """Run ``stexp-<command>``; what ends it badly goes to ``<logs>/failure.json``."""
    from importlib import import_module  # all of these after the process is tied
    from pathlib import Path

    from stexp.sweeps.failure import write_failure

    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the sweep was started with & or nohup
    sys.argv = [f"stexp-{command}", *arguments]
    try:
        import_module(f"stexp.cli.{command}").main()
    except SystemExit as end:
        if end.code:  # a command ends so after it has said what is wrong
            write_failure(Path(logs), end.__context__ or end, end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException as error:
        write_failure(Path(logs), error, 1)
        raise


if __name__ == "__main__":
    tie_to(int(os.environ.pop("STEXP_PARENT")))
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
