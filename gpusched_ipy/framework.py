"""What the frameworks that a process has imported hold of a GPU, and what of it they can give back.

It imports none of them itself. What is given back is their stock: blocks that no live array uses.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger(__name__)

# Frameworks whose allocator keeps its stock until the process ends.
_KEEPERS = {"jax": "JAX", "tensorflow": "TensorFlow"}


@dataclass(frozen=True, slots=True)
class Freed:
    """What emptying the caches has brought."""

    bytes: Mapping[str, int] = field(default_factory=dict)  # by the name of the framework
    keepers: tuple[str, ...] = ()  # imported frameworks that give nothing back while they live
    faults: tuple[str, ...] = ()  # what a framework said that could not do it

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.bytes.values())


def has_context() -> bool:
    """Whether a framework has opened the GPU: it no longer looks at CUDA_VISIBLE_DEVICES."""
    return _torch() is not None or _cupy() is not None


def has_stock() -> bool:
    """Whether a framework of this process may hold GPU memory that it can give back."""
    return bool(_stocks())


def free_caches() -> Freed:
    """Give the GPU memory that no live array uses back to the driver."""
    stocks = _stocks()
    if stocks:
        gc.collect()  # arrays that nobody can reach any more
    came_back: dict[str, int] = {}
    faults: list[str] = []
    for name, (stock, empty) in stocks.items():
        try:
            before = stock()
            empty()
            came_back[name] = max(0, before - stock())
        except Exception as exc:  # noqa: BLE001 - a framework whose driver has failed; it is said
            _log.warning("%s could not empty its caches: %s", name, exc)
            faults.append(f"{name}: {type(exc).__name__}: {exc}")
    keepers = tuple(name for module, name in _KEEPERS.items() if module in sys.modules)
    return Freed(came_back, keepers, tuple(faults))


def _stocks() -> dict[str, tuple[Callable[[], int], Callable[[], None]]]:
    """For each framework with memory on a GPU: how much it holds, and how its stock is emptied."""
    found: dict[str, tuple[Callable[[], int], Callable[[], None]]] = {}
    torch, cupy = _torch(), _cupy()
    if torch is not None:
        found["PyTorch"] = (lambda: _reserved(torch.cuda), torch.cuda.empty_cache)
    xpu, mps = _torch_part("xpu"), _torch_part("mps")
    if xpu is not None and xpu.is_available() and xpu.is_initialized():
        found["PyTorch (XPU)"] = (lambda: _reserved(xpu), xpu.empty_cache)
    if mps is not None and mps.is_available() and mps.driver_allocated_memory():
        found["PyTorch (MPS)"] = (mps.driver_allocated_memory, mps.empty_cache)
    if cupy is not None:
        found["CuPy"] = (cupy.get_default_memory_pool().total_bytes, lambda: _empty_cupy(cupy))
    return found


def _reserved(part: Any) -> int:
    """Bytes that PyTorch holds on all its devices, live arrays and stock together."""
    return sum(int(part.memory_reserved(place)) for place in range(part.device_count()))


def _empty_cupy(cupy: Any) -> None:
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def _torch() -> Any:
    """PyTorch, if it is imported and has opened a GPU."""
    cuda = _torch_part("cuda")
    return sys.modules["torch"] if cuda is not None and cuda.is_initialized() else None


def _torch_part(name: str) -> Any:
    return getattr(sys.modules.get("torch"), name, None)


def _cupy() -> Any:
    """CuPy, if it is imported and holds memory."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not hasattr(cupy, "get_default_memory_pool"):
        return None
    return cupy if cupy.get_default_memory_pool().total_bytes() else None
