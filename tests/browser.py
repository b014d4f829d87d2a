"""A headless Chromium for tests that open pages, driven through its debugging pipe; it needs no driver of its own."""

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # the sandbox refuses to run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--window-size=1300,900",
    # No dialogs, no updates and no requests of its own. On a machine without a network they would only wait.
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-quic",
    "--disable-sync",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
TIME_LIMIT = 120  # seconds for one answer; on a busy machine a browser takes some seconds to start


def find_browser() -> Optional[str]:
    """Return the command of a Chromium on this machine, or None; the variable BROWSER_BINARY names another one."""
    return os.environ.get("BROWSER_BINARY") or next(filter(None, map(shutil.which, NAMES)), None)


# Without a browser these tests are skipped, unless LONGMEM_REQUIRE_BROWSER is set (.ci/run sets it): then they fail.
in_browser = pytest.mark.skipif(
    find_browser() is None and not os.environ.get("LONGMEM_REQUIRE_BROWSER"),
    reason="no Chromium is installed: apt-get install chromium, or set BROWSER_BINARY",
)


class Page:
    """A page in its own browser, used as a context manager.

    Args:
        path: Path of the HTML file.

    Attributes:
        requests: Addresses that the page requested.
        errors: Exceptions of the page's script and errors that the browser logged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.requests: List[str] = []
        self.errors: List[str] = []
        self._last, self._session, self._rest = 0, None, b""

    def __enter__(self) -> "Page":
        browser = find_browser()
        assert browser, f"LONGMEM_REQUIRE_BROWSER is set, but none of {', '.join(NAMES)} is installed"
        self._directory = Path(tempfile.mkdtemp(prefix="browser-"))
        commands, answers = os.pipe(), os.pipe()
        # Chromium reads commands from file 3 and writes its answers to file 4.
        pipes = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
        options = ["--remote-debugging-pipe", f"--user-data-dir={self._directory / 'profile'}", *OPTIONS]
        with open(self._directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", pipes, "bash", browser, *options],
                pass_fds=(commands[0], answers[1]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(commands[0])
        os.close(answers[1])
        self._write, self._read = commands[1], answers[0]
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            self.call("Page.navigate", url=self.path.resolve().as_uri())
            self.wait("document.readyState == 'complete'")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._write)
        os.close(self._read)
        # The browser ends when its pipe is closed. Its processes are a group, so that none is left behind.
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def call(self, method: str, **parameters) -> Dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        try:
            os.write(self._write, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise AssertionError(self._failure("the browser has ended")) from None
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> Dict[str, Any]:
        end = time.monotonic() + TIME_LIMIT
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._read, 1 << 20) if ready else b""
            reason = "the browser has ended" if ready else f"no answer of the browser within {TIME_LIMIT} seconds"
            assert piece, self._failure(reason)
            self._rest += piece
        answer, self._rest = self._rest.split(b"\0", 1)
        return json.loads(answer)

    def _failure(self, reason: str) -> str:
        log = (self._directory / "log").read_text(encoding="utf-8", errors="replace")
        return f"{reason}; the end of its log:\n{log[-3000:]}"

    def _note(self, event: Dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true in the page."""
        end = time.monotonic() + TIME_LIMIT
        while not self.run(condition):
            assert time.monotonic() < end, f"not true within {TIME_LIMIT} seconds: {condition}"
            time.sleep(0.05)

    def mouse(self, element: str, click: bool = True) -> None:
        """Move the mouse to an element and click it.

        Args:
            element: JavaScript expression of the element.
            click: If false, the mouse is only moved.
        """
        x, y = self.run(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getClientRects()[0]; return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Press and release a key, given by its name in JavaScript."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name)
