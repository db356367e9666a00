"""A page in headless Chromium, driven through its DevTools protocol over a pipe by the standard library alone."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Page:
    """One page, and what it said on its console."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._held, self._ids = to, back, b"", itertools.count(1)
        self._session: str | None = None
        self.said: list[str] = []
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, seconds: float = 60, **parameters: Any) -> dict:
        """Send one command and return its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        end = time.monotonic() + seconds
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _receive(self, end: float) -> dict:
        while b"\0" not in self._held:
            if not select.select([self._back], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            more = os.read(self._back, 1 << 16)
            if not more:
                raise EOFError("the browser is gone")
            self._held += more
        message, self._held = self._held.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        if event.get("sessionId") != self._session:
            return
        told = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.said.append(told["exceptionDetails"].get("exception", {}).get("description", "exception"))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.said.append(told["entry"]["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.said.append(str(told["args"]))

    def close(self) -> None:
        self.call("Target.closeTarget", targetId=self._target)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, path: Path) -> None:
        """Open a report and wait until it is drawn."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def js(self, expression: str) -> Any:
        """Value of an expression; promises are awaited."""
        made = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in made:
            raise RuntimeError(made["exceptionDetails"]["exception"]["description"])
        return made["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until an expression is true, looked at on every frame."""
        self.js(
            f"new Promise((done, fail) => {{ const end = performance.now() + {1000 * seconds};"
            f"const look = () => ({condition}) ? done() : performance.now() > end"
            f" ? fail(new Error({json.dumps(condition + ' did not come about')})) : setTimeout(look, 10); look(); }})"
        )

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            held = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", buttons=1, clickCount=1)
        for share in (0.5, 1):
            at = {"x": x + share * (to_x - x), "y": y + share * (to_y - y)}
            self.call("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=to_x, y=to_y, button="left", clickCount=1)

    def key(self, name: str, *, shift: bool = False) -> None:
        text = {"text": "\r"} if name == "Enter" else {"text": name} if len(name) == 1 else {}
        held = {"key": name, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **held, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **held)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def middle(self, selector: str) -> tuple[float, float]:
        """Middle of an element on the screen, scrolled to first."""
        return tuple(
            self.js(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
                "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
            )
        )

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A screenshot."""
        made = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(made["data"]))

    def pdf(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Callable[[], Page]]:
    """Chromium with its profile in a folder; calls give pages."""
    (read, to), (back, write) = os.pipe(), os.pipe()
    # Chromium reads from 3 and writes to 4
    shell = f'exec 3<&{read} 4>&{write}; exec "$0" "$@"'
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read, write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    try:
        yield lambda: Page(to, back)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to)
        os.close(back)
