"""A headless Chromium that tests open pages in, driven through its debugging pipe; no driver of its own is needed."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-gpu",
    "--disable-quic", "--disable-sync", "--no-first-run", "--no-default-browser-check",
)  # fmt: skip
TIME_LIMIT = 120  # seconds for one answer; a browser on a busy machine takes some to start


def find_browser() -> Optional[str]:
    """The command of a Chromium on this machine, None where there is none; BROWSER_BINARY names another."""
    return os.environ.get("BROWSER_BINARY") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser of its own; use it as a context.

    Args:
        path: the HTML file.

    Attributes:
        requests: addresses that the page asked for.
        errors: what its script threw and the browser logged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.requests: List[str] = []
        self.errors: List[str] = []
        self._last, self._session, self._rest = 0, None, b""

    def __enter__(self) -> "Page":
        self._profile = tempfile.mkdtemp(prefix="browser-")
        ours, theirs = os.pipe(), os.pipe()  # what the browser reads, what it writes
        # Chromium reads commands from file 3 and answers on file 4.
        start = [
            "bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}', "bash", find_browser(),
            "--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={self._profile}",
            "--window-size=1300,900", *QUIET,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            start, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
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
        self._process.terminate()
        self._process.wait(TIME_LIMIT)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters) -> Dict[str, Any]:
        """What a method of the DevTools protocol returns."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
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
            assert piece, "the browser has ended, or does not answer"
            self._rest += piece
        answer, self._rest = self._rest.split(b"\0", 1)
        return json.loads(answer)

    def _note(self, event: Dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression in the page is true."""
        end = time.monotonic() + TIME_LIMIT
        while not self.run(condition):
            assert time.monotonic() < end, f"the page never had: {condition}"
            time.sleep(0.05)

    def mouse(self, element: str, click: bool = True) -> None:
        """Move the mouse onto an element, given as an expression, and click it."""
        place = self.run(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getClientRects()[0]; return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        where = {"x": place[0], "y": place[1]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def key(self, name: str) -> None:
        """Press a key, by its name in JavaScript."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name)
