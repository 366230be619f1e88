"""What the frameworks that a kernel has imported hold of a GPU. It imports none of them itself."""

from __future__ import annotations

import gc
import sys
from typing import Any


def has_context() -> bool:
    """Whether a framework has opened the GPU: it no longer looks at CUDA_VISIBLE_DEVICES."""
    return _torch() is not None or _cupy() is not None


def free_caches() -> list[str]:
    """Give cached GPU memory back to the driver; the names of the frameworks that had some."""
    freed: list[str] = []
    torch, cupy = _torch(), _cupy()
    if torch is not None or cupy is not None:
        gc.collect()
    if torch is not None:
        torch.cuda.empty_cache()
        freed.append("PyTorch")
    if cupy is not None:
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
        freed.append("CuPy")
    return freed


def _torch() -> Any:
    """PyTorch, if it is imported and has opened a GPU."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return sys.modules["torch"] if cuda is not None and cuda.is_initialized() else None


def _cupy() -> Any:
    """CuPy, if it is imported and holds memory."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not hasattr(cupy, "get_default_memory_pool"):
        return None
    return cupy if cupy.get_default_memory_pool().total_bytes() else None
