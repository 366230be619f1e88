"""AMD's own library, used where it imports cleanly. It never decides that a card exists or is idle.

The wrapper binds its symbols at import and must fit the installed ROCm: without one it prints to
stdout and raises KeyError. Any fault of it is a reason for people, never an exception.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping
from typing import Any

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends._amd_text import Reading, from_amdsmi


class AmdSmi:
    """The cards as amdsmi sees them, by PCI address."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._module: Any = None
        self._tried = False

    @property
    def present(self) -> bool:
        """Whether such a module is installed; says nothing of whether it works."""
        try:
            return importlib.util.find_spec("amdsmi") is not None
        except (ImportError, ValueError):
            return False

    def read(self, detail: Detail) -> Mapping[str, Reading]:
        """A reading of each card; empty, with :attr:`problem` set, where the library fails."""
        if not self._tried:
            self._tried = True
            self._open()
        if self._module is None:
            return {}
        handles = self._ask("amdsmi_get_processor_handles")
        if not isinstance(handles, (list, tuple)):
            self.problem = "amdsmi lists no processors"
            return {}
        found: dict[str, Reading] = {}
        for handle in handles:
            bdf = self._ask("amdsmi_get_gpu_device_bdf", handle)
            if isinstance(bdf, str):
                found[bdf.lower()] = self._card(handle, detail)
        return found

    def close(self) -> None:
        """Let go of the library; a later reading opens it again."""
        if self._module is not None:
            self._ask("amdsmi_shut_down")
        self._module, self._tried, self.problem = None, False, None

    def _open(self) -> None:
        if not self.present:
            return
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                module = importlib.import_module("amdsmi")
                module.amdsmi_init()
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - whatever a foreign library does
            self.problem = f"amdsmi does not work here ({type(exc).__name__}: {exc})"
            return
        self._module = module

    def _card(self, handle: Any, detail: Detail) -> Reading:
        answers: dict[str, Any] = {
            "asic": self._ask("amdsmi_get_gpu_asic_info", handle),
            "board": self._ask("amdsmi_get_gpu_board_info", handle),
            "activity": self._ask("amdsmi_get_gpu_activity", handle),
            "vram": self._ask("amdsmi_get_gpu_vram_usage", handle),
        }
        if detail >= Detail.PROCESSES:
            answers["processes"] = self._processes(handle)
        if detail >= Detail.FULL:
            answers["power"] = self._ask("amdsmi_get_power_info", handle)
            answers["temperature"] = self._temperature(handle)
            answers["clock"] = self._ask(
                "amdsmi_get_clock_info", handle, self._constant("AmdSmiClkType", "GFX")
            )
        return from_amdsmi(**answers)

    def _temperature(self, handle: Any) -> Any:
        """Of the edge or, on cards that have none, of the hot spot."""
        now = self._constant("AmdSmiTemperatureMetric", "CURRENT")
        for sensor in ("EDGE", "HOTSPOT", "JUNCTION"):
            kind = self._constant("AmdSmiTemperatureType", sensor)
            answer = (
                None if kind is None else self._ask("amdsmi_get_temp_metric", handle, kind, now)
            )
            if answer not in (None, "N/A", 0):
                return answer
        return None

    def _processes(self, handle: Any) -> Any:
        """The list of processes; older releases list handles that have to be asked one by one."""
        listed = self._ask("amdsmi_get_gpu_process_list", handle)
        if not isinstance(listed, (list, tuple)):
            return None
        return [
            item
            if isinstance(item, Mapping)
            else self._ask("amdsmi_get_gpu_process_info", handle, item)
            for item in listed
        ]

    def _constant(self, group: str, name: str) -> Any:
        return getattr(getattr(self._module, group, None), name, None)

    def _ask(self, function: str, *arguments: Any) -> Any:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                return getattr(self._module, function)(*arguments)
        except Exception as exc:  # noqa: BLE001 - "not supported" has as many types as releases
            self.problem = f"{function}: {type(exc).__name__}: {exc}"
            return None
