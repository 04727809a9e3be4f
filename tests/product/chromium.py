"""A page in headless Chromium, asked over the DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
WAIT = 60.0
LOADED = "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))"


class Tab:
    """One page. events: what it told meanwhile, its log among it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number, self.events = socket, 0, list[dict[str, Any]]()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a command of the protocol."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=WAIT))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script: str) -> Any:
        """Value of an expression in the page, once it is settled."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@contextmanager
def opened(file: Path, profile: Path, *options: str) -> Iterator[Tab]:
    """The page of `file` when it is loaded."""
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0", *options, "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            address, until = profile / "DevToolsActivePort", time.monotonic() + WAIT
            while not (address.is_file() and len(address.read_text().split()) == 2):
                assert browser.poll() is None and time.monotonic() < until, "Chromium does not answer"
                time.sleep(0.1)
            port = address.read_text().split()[0]
            with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT) as answer:
                (blank,) = [tab for tab in json.load(answer) if tab["type"] == "page"]
            with connect(blank["webSocketDebuggerUrl"], max_size=None) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Accessibility"):
                    tab.ask(f"{domain}.enable")
                tab.ask("Page.navigate", url=file.as_uri())
                tab.evaluate(LOADED)
                yield tab
        finally:
            browser.terminate()
