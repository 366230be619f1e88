"""Drives JupyterLab and Notebook 7 in Chromium: opens notebooks, runs cells, looks at them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from helpers import wait_until
from playwright.sync_api import BrowserContext, Locator, Page, sync_playwright

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
)
# A page on a loaded machine may need long; every wait is for something that is seen on the page.
PATIENCE_MS = 150_000
_NO_NEWS = '{"fetchNews": "false", "checkForUpdates": false}'


@contextmanager
def jupyter_server(folder: Path) -> Iterator[tuple[str, Path]]:
    """A JupyterLab of this Python on 127.0.0.1, with all its state below ``folder``.

    Yields its address and the folder of its notebooks.
    """
    notebooks = folder / "notebooks"
    news = folder / "settings" / "@jupyterlab" / "apputils-extension"
    for needed in (notebooks, news):
        needed.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text(_NO_NEWS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "XDG_STATE_HOME": "state",
        "XDG_CONFIG_HOME": "xdg",
    }
    environ = os.environ | {name: str(folder / place) for name, place in places.items()}
    argv = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--allow-root", "--IdentityProvider.token="),
        *("--ServerApp.password=", "--ServerApp.disable_check_xsrf=True"),
        *("--expose-app-in-browser", "--JupyterNotebookApp.expose_app_in_browser=True"),
        f"--ServerApp.root_dir={notebooks}",
    ]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            argv, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: server.poll() is not None or _answers(base), 180, "the server answers")
        assert server.poll() is None, (folder / "server.log").read_text()
        yield base, notebooks
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _answers(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/api", timeout=2):
            return True
    except OSError:
        return False


@contextmanager
def chromium(profile: Path, width: int = 1200, height: int = 1300) -> Iterator[BrowserContext]:
    """A browser with a profile of its own."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            timeout=PATIENCE_MS,
            args=list(_FLAGS),
            viewport={"width": width, "height": height},
        )
        context.set_default_timeout(PATIENCE_MS)
        try:
            yield context
        finally:
            context.close()


class Lab:
    """One notebook in one page.

    Args:
        context: the browser.
        base: address of the server.
        path: the notebook that is opened.
        cells: the sources of its code cells, for a notebook that is written first.
        classic: open it in Notebook 7.
    """

    def __init__(
        self,
        context: BrowserContext,
        base: str,
        path: Path,
        cells: list[str] | None = None,
        *,
        classic: bool = False,
    ) -> None:
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.path = path
        if cells is not None:
            book = nbformat.v4.new_notebook()
            book.cells = [nbformat.v4.new_code_cell(source) for source in cells]
            book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
            nbformat.write(book, path)
        place = "notebooks" if classic else "lab/tree"
        self._address = f"{base}/{place}/{path.name}{'' if classic else '?reset'}"
        self.open()

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self) -> None:
        """Load the page (again) and wait until the notebook and its kernel are there."""
        self.page.goto(self._address, wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")
        self.wait_kernel("idle")

    def wait_kernel(self, status: str) -> None:
        """Wait until the kernel is ``idle`` or ``busy``."""
        self.page.wait_for_function(
            """status => { const shown = window.jupyterapp.shell.currentWidget;
            return shown?.sessionContext?.kernelDisplayStatus === status }""",
            arg=status,
        )

    def command(self, name: str, args: dict[str, Any] | None = None, *, wait: bool = True) -> None:
        """Run a command of JupyterLab; without ``wait`` it goes on by itself."""
        # page.evaluate has no time limit of its own.
        done = self.page.evaluate(
            """([name, args, wait]) => { const run = window.jupyterapp.commands.execute(name, args);
            const late = new Promise((_, no) => setTimeout(() => no(Error("too late")), 140000));
            return wait ? Promise.race([run, late]).then(() => true) : true }""",
            [name, args or {}, wait],
        )
        assert done is True

    def run(self, place: int, *, wait: bool = True) -> str:
        """Run a cell; the text of its streams, once it has ended. An error fails the test."""
        self.page.evaluate(
            "place => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = place }",
            place,
        )
        self.command("notebook:run-cell", wait=wait)
        if not wait:
            return ""
        outputs: list[dict[str, Any]] = self.page.evaluate(
            """place => window.jupyterapp.shell.currentWidget.content.model.cells.get(place)
            .outputs.toJSON()""",
            place,
        )
        failed = [out for out in outputs if out["output_type"] == "error"]
        assert not failed, "\n".join(failed[0]["traceback"])
        return "".join(str(out.get("text", "")) for out in outputs)

    def write(self, place: int, source: str) -> None:
        """Give a cell another source."""
        self.page.evaluate(
            """([place, source]) => window.jupyterapp.shell.currentWidget.content.model.cells
            .get(place).sharedModel.setSource(source)""",
            [place, source],
        )

    def save(self) -> Any:
        """Save the notebook; what lies on the disk then."""
        self.command("docmanager:save")
        return nbformat.read(self.path, as_version=4)

    def ask(self, code: str) -> str:
        """What ``code`` prints in the kernel; no cell is run, so nothing moves on the screen."""
        return str(
            self.page.evaluate(
                """async code => { const kernel =
                window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                const future = kernel.requestExecute({ code, store_history: false });
                let text = "";
                future.onIOPub = message => { text += message.content.text || "" };
                const late = new Promise(
                    (_, no) => setTimeout(() => no(Error("too late")), 140000));
                await Promise.race([future.done, late]);
                return text }""",
                code,
            )
        )

    def active_cell(self) -> int:
        """The place of the cell that the notebook has selected."""
        return int(
            self.page.evaluate(
                "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"
            )
        )

    def output(self, place: int) -> Locator:
        """What is shown below a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(place).locator(".jp-Cell-outputArea")

    def shutdown(self) -> None:
        """End the kernel."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
