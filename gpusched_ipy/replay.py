"""Shows recorded messages in the cell that runs now: through its own streams and display."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gpusched_ipy.errors import RemoteError


def show(kind: str, content: Mapping[str, Any]) -> None:
    """Show one message; an error as its text."""
    if kind == "stream":
        stream = sys.stdout if content["name"] == "stdout" else sys.stderr
        stream.write(content["text"])
        stream.flush()
    elif kind == "error":
        print("\n".join(traceback_of(content)))
    elif kind == "clear_output":
        from IPython.display import clear_output

        clear_output(wait=bool(content.get("wait")))
    else:
        show_data(
            content.get("data", {}),
            content.get("metadata") or {},
            (content.get("transient") or {}).get("display_id"),
            update=kind == "update_display_data",
        )


def show_data(data: Any, metadata: Any, display_id: str | None = None, **more: Any) -> None:
    """Show a display in the running cell."""
    from IPython.display import display

    known = {} if display_id is None else {"display_id": display_id, **more}
    display(data, metadata=metadata, raw=True, **known)


def traceback_of(content: Mapping[str, Any]) -> list[str]:
    """The lines of an error."""
    return content.get("traceback") or [f"{content.get('ename')}: {content.get('evalue')}"]


class Stage:
    """Shows the messages of a cell that holds its place, and keeps its last error to be raised."""

    def __init__(self) -> None:
        self._error: Mapping[str, Any] | None = None

    def show(self, kind: str, content: Mapping[str, Any]) -> None:
        """Show one message; an error only when another one follows it."""
        if self._error is not None:
            show("error", self._error)
            self._error = None
        if kind == "error":
            self._error = content
        else:
            show(kind, content)

    @property
    def error(self) -> BaseException | None:
        """The error that ended the cell, to be raised here: same name, same traceback."""
        if self._error is None:
            return None
        lines = traceback_of(self._error)
        kind = type(
            str(self._error.get("ename")).replace("\0", ""),
            (RemoteError,),
            {"_render_traceback_": lambda _self: lines, "__module__": RemoteError.__module__},
        )
        error: BaseException = kind(str(self._error.get("evalue")))
        return error
