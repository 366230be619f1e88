"""Recognises that a job has run out of GPU memory: by its exception, or by what it has logged.

Out of the machine's own memory is something else, and never counts. It imports no framework.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from gpusched_ipy.statedir import open_existing

# So much of a log's end is looked at: a traceback, and what several processes add to it.
TAIL_BYTES = 32 * 1024
# What the error of such a job begins with, for people; programs ask for ``oom``.
LEAD = "out of GPU memory: "
_DEEP = 16  # so many exceptions that led to one another are looked at
_LINE_CHARS = 200

# By the name that the class or one of its bases has, and where that is defined.
_CLASSES = {
    ("torch", "OutOfMemoryError"),  # of CUDA, ROCm and XPU; torch.cuda has the same class
    ("cupy", "OutOfMemoryError"),
    ("cupy_backends", "OutOfMemoryError"),
    ("tensorflow", "ResourceExhaustedError"),
}
# Classes that stand for more than this; the text of the exception decides.
_BY_TEXT = {
    ("jaxlib", "XlaRuntimeError"),
    ("jaxlib", "JaxRuntimeError"),
    ("jax", "JaxRuntimeError"),
}
_EXHAUSTED = "RESOURCE_EXHAUSTED"

# What the frameworks and drivers write; without "(?i)" the case is as they write it.
_LOGGED = re.compile(
    r"""
      (?:CUDA|HIP|XPU)\ out\ of\ memory                       # PyTorch
    | MPS\ backend\ out\ of\ memory                           # PyTorch on Apple
    | torch(?:\.cuda)?\.OutOfMemoryError
    | (?:CUDA|HIP|hip|cuda)\ error(?::|\ \d+)[^\n]{0,40}out\ of\ memory
    | (?:cuda|hip)ErrorMemoryAllocation | (?:cuda|hip)ErrorOutOfMemory
    | CUDA_ERROR_OUT_OF_MEMORY | HIP_ERROR_OutOfMemory
    | CU(?:BLAS|DNN|SPARSE|FFT|RAND)_STATUS_ALLOC_FAILED
    | cuda(?:Malloc|MallocAsync|MallocManaged)\ failed:?\ out\ of\ memory   # ggml, llama.cpp
    | cupy\S*\.OutOfMemoryError
    | (?:XlaRuntimeError|JaxRuntimeError):\ RESOURCE_EXHAUSTED
    | RESOURCE_EXHAUSTED:\ Out\ of\ memory                    # XLA
    | OOM\ when\ allocating\ tensor[^\n]{0,200}device:GPU     # TensorFlow
    | kIOGPUCommandBufferCallbackErrorOutOfMemory             # Metal
    """,
    re.VERBOSE,
)


def in_exception(error: BaseException | None) -> bool:
    """Whether the exception, or one that led to it, says that the GPU's memory was not enough."""
    return any(_says_so(found) for found in _chain(error))


def in_log(path: Path) -> str | None:
    """The line near the end of a log that says that the GPU's memory was not enough, or None."""
    try:
        fd = open_existing(path)
    except FileNotFoundError:
        return None
    try:
        start = max(0, os.fstat(fd).st_size - TAIL_BYTES)
        text = os.pread(fd, TAIL_BYTES, start).decode("utf-8", "replace")
    finally:
        os.close(fd)
    return in_text(text)


def in_text(text: str) -> str | None:
    """The last line of ``text`` that says so, cut to what can be shown, or None."""
    every = list(_LOGGED.finditer(text))
    if not every:
        return None
    found = every[-1]
    begin = text.rfind("\n", 0, found.start()) + 1
    end = text.find("\n", found.end())
    line = text[begin : len(text) if end < 0 else end].strip()
    if len(line) > _LINE_CHARS:
        line = text[found.start() :][: _LINE_CHARS - 1].split("\n", 1)[0] + "…"
    return line


def _says_so(error: BaseException) -> bool:
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    text = _text(error)
    if kinds & _CLASSES:
        # TensorFlow says so of the machine's own memory as well.
        return "device:CPU" not in text
    if kinds & _BY_TEXT:
        return _EXHAUSTED in text
    return _LOGGED.search(text) is not None


def _text(error: BaseException) -> str:
    try:
        return str(error)[:TAIL_BYTES]
    except Exception:  # noqa: BLE001 - an exception of the user's, whose text is code of theirs
        return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what it was raised from, and the members of a group."""
    waiting = [error] if error is not None else []
    seen: set[int] = set()
    while waiting and len(seen) < _DEEP:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions
        before = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
        if before is not None:
            waiting.append(before)
