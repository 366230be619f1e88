"""Every setting as a trait: ``%config GpuQueue.panel_hz = 2``, ``c.GpuQueue.panel_hz = 2``.

Loaded when somebody configures or a setting is first asked for, not by ``%load_ext``. It reads no
file and no environment by itself: that is for ``config``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from traitlets import TraitError, TraitType, observe
from traitlets.config import Configurable

from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError


class SettingTrait(TraitType[Any, Any]):
    """One setting; None: not set here, so that environment, file and default speak."""

    default_value = None
    allow_none = True

    def __init__(self, setting: str, **kwargs: Any) -> None:
        super().__init__(default_value=None, allow_none=True, **kwargs)
        self.setting = setting

    def validate(self, obj: Any, value: Any) -> Any:
        """Refuse what the setting does not take."""
        try:
            Settings.parse(self.setting, value)
        except UserError as exc:
            raise TraitError(str(exc)) from None
        return value

    def from_string(self, text: str) -> Any:
        """A value of the command line: settings parse text themselves."""
        return None if text == "None" else text


def _traits() -> dict[str, SettingTrait]:
    return {
        item.name: SettingTrait(
            item.name, help=f"{item.metadata['doc']} (default: {item.metadata['shown']})"
        ).tag(config=True)
        for item in fields(Settings)
        if "parse" in item.metadata
    }


class GpuQueue(Configurable):
    """The settings of one shell, under the name that its configuration knows.

    Args:
        shell: its configuration is taken; a bad value there is dropped, and said.
        changed: called when a setting has changed later on.
    """

    vars().update(_traits())

    def __init__(self, shell: Any, changed: Callable[[], None]) -> None:
        self._changed: Callable[[], None] | None = None
        _drop_bad_values(shell.config.get(type(self).__name__, {}))
        super().__init__(parent=shell)
        self._changed = changed

    def settings(self) -> Settings:
        """The settings in force now.

        Raises:
            UserError: one in the environment or in the file cannot be used.
        """
        given = {name: getattr(self, name) for name in Settings.names()}
        return Settings.load({name: value for name, value in given.items() if value is not None})

    @observe(*Settings.names())
    def _reconfigure(self, change: Any) -> None:
        if self._changed is not None:
            self._changed()


def _drop_bad_values(section: Any) -> None:
    """A value that ``%config`` has refused stays in the shell's configuration all the same."""
    for name in list(section):
        try:
            Settings.parse(name, section[name])
        except UserError as exc:
            del section[name]
            print(f"gpuqueue: {exc}; it is passed over")
