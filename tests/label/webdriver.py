"""A browser, driven over the W3C WebDriver protocol: the few calls that the tests need."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "needs chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage",
)  # fmt: skip
KEYS = {"Enter": "\ue007", "Left": "\ue012", "Right": "\ue014", "Shift": "\ue008"}


class Browser:
    """One browser, several tabs.

    Args:
        driver: address of chromedriver.
        profile: empty folder for the browser's data.
        size: of the window in pixels.
        patience: seconds after which waiting fails.
    """

    def __init__(self, driver: str, profile: Path, size: tuple[int, int] = (1280, 860), patience: float = 120) -> None:
        self._driver, self._patience = driver, patience
        arguments = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "timeouts": {"script": 300_000}}}}
        self._session = f"/session/{self._call('POST', '/session', wanted)['sessionId']}"

    def open(self, address: str) -> None:
        """Load a page."""
        self._call("POST", f"{self._session}/url", {"url": address})

    def reload(self) -> None:
        """Load the page anew."""
        self._call("POST", f"{self._session}/refresh", {})

    def new_tab(self) -> str:
        """Open a tab and go there; returns its handle."""
        handle = str(self._call("POST", f"{self._session}/window/new", {"type": "tab"})["handle"])
        self.switch(handle)
        return handle

    def tab(self) -> str:
        """Handle of the tab in use."""
        return str(self._call("GET", f"{self._session}/window"))

    def switch(self, handle: str) -> None:
        """Go to a tab."""
        self._call("POST", f"{self._session}/window", {"handle": handle})

    def run(self, script: str) -> Any:
        """Run JavaScript; returns what it returns."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + self._patience
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, (
                f"not true in time: {condition}; page: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys together, as a person does."""
        values = [KEYS.get(key, key) for key in keys]
        strokes = [{"type": "keyDown", "value": v} for v in values] + [
            {"type": "keyUp", "value": v} for v in values[::-1]
        ]
        self._call("POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def type(self, selector: str, text: str) -> None:
        """Fill a field, in place of what it holds."""
        (element,) = self._call(
            "POST", f"{self._session}/element", {"using": "css selector", "value": selector}
        ).values()
        self._call("POST", f"{self._session}/element/{element}/clear", {})
        self._call("POST", f"{self._session}/element/{element}/value", {"text": text})

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def quit(self) -> None:
        """Close the browser."""
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=2 * self._patience) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:1000]}") from error


@contextmanager
def browser(profile: Path, size: tuple[int, int] = (1280, 860)) -> Iterator[Browser]:
    """A browser that is closed at the end, and its driver with it."""
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        window = Browser(f"http://127.0.0.1:{port}", profile, size)
        try:
            yield window
        finally:
            window.quit()
    finally:
        driver.terminate()
        driver.wait()
