"""The picture that is saved with the notebook: an output of its own below the live panel.

Hidden by the page while the panel lives; what is left when its kernel is gone. Renewed only when
there is something new to keep, because each renewal changes the notebook.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gpusched_ipy.frontend import FrontEnd

_HTML = "text/html"
# In the place of a widget without a model front ends show an error; the picture stands for it.
_NO_ERROR = (
    "<style>.jp-OutputArea-child:has(+ .jp-OutputArea-child .gsq-still)"
    " > .jp-OutputArea-output:not(:has(*)) { display: none }</style>"
)


class Picture:
    """One output, shown in one or several cells and renewed in all of them.

    Args:
        bundle: makes the picture.
        model_id: of the widget that stands above it.
    """

    def __init__(self, bundle: Callable[[], dict[str, Any]], model_id: str) -> None:
        from IPython import get_ipython

        self._bundle = bundle
        self._model_id = re.sub(r"[^\w-]", "", model_id)
        self._front = FrontEnd(get_ipython())
        self._parent: Any = {}

    @property
    def _display_id(self) -> str:
        return f"gsq-picture-{self._model_id}"

    def show(self) -> None:
        """Show it below what the running cell has shown."""
        from IPython.display import display

        self._parent = dict(self._front.parent)
        display(self._data(), raw=True, display_id=self._display_id)

    def renew(self) -> None:
        """Show how things are now, wherever it is shown; from any thread."""
        self._front.display(self._data(), self._display_id, self._parent, update=True)

    def _data(self) -> dict[str, Any]:
        bundle = self._bundle()
        html = f'<div class="gsq-still" data-panel="{self._model_id}">{_NO_ERROR}'
        return bundle | {_HTML: f"{html}{bundle[_HTML]}</div>"}
