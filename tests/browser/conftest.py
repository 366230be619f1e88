"""One Jupyter server for all browser tests, a browser for each, where the screenshots go."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from requires import require

# Read before the fixture that takes every GPUSCHED_ variable away from the tests.
_ARTIFACTS = os.environ.get("GPUSCHED_ARTIFACTS")


def _missing() -> str | None:
    for module in ("playwright", "jupyterlab", "notebook"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    names = ("chromium", "chromium-browser", "google-chrome")
    return None if any(map(shutil.which, names)) else "there is no Chromium"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a running JupyterLab and the folder of its notebooks."""
    missing = _missing()
    require("browser", missing is None, missing or "")
    from browser.lab import jupyter_server

    with jupyter_server(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture
def browser(server: tuple[str, Path], tmp_path: Path) -> Iterator[Any]:
    """A browser of its own."""
    from browser.lab import chromium

    with chromium(tmp_path / "profile") as context:
        yield context


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[[Any, str], Path]:
    """Save a screenshot of a page, for people to look at."""
    folder = Path(_ARTIFACTS) if _ARTIFACTS else tmp_path / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)

    def save(page: Any, name: str) -> Path:
        path = folder / f"{name}.png"
        page.screenshot(path=str(path))
        return path

    return save
