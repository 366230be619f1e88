"""A process is bound to the GPUs that CUDA was opened with, whichever library has opened it.

The driver's library is played by a small one of the same name; the rest is real.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FakeScript
from requires import require

from gpusched_ipy import cuda

pytestmark = pytest.mark.cc
UUIDS = [f"GPU-{'-'.join(digit * size for size in (8, 4, 4, 4, 12))}" for digit in "01"]
OPEN = "import ctypes, os; cu = ctypes.CDLL({library!r}, os.RTLD_NOW)\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("cc", shutil.which("cc"), "there is no C compiler")
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    argv = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", path, source]
    subprocess.run(argv, check=True)
    return path


def said(code: str, library: Path) -> list[str]:
    """What a Python prints that has loaded that library."""
    program = OPEN.format(library=str(library)) + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_without_cuda_the_process_is_bound_to_nothing() -> None:
    if cuda._loaded() is not None:
        pytest.skip("this process has loaded CUDA")
    assert cuda.opened() is None


def test_what_it_is_bound_to(library: Path) -> None:
    code = (
        "from gpusched_ipy.cuda import opened\nprint(opened()); cu.cuInit(0)\n"
        "print(opened(), len(opened(2)))\ncu.cuDevicePrimaryCtxRetain(None, 1); print(opened(2))"
    )
    first, second = (uuid.removeprefix("GPU-") for uuid in UUIDS)
    assert said(code, library) == ["None", f"('{first}',) 2", f"('{second}',)"]


def test_names_are_matched_whatever_stands_before_them() -> None:
    tail = UUIDS[1].removeprefix("GPU-")
    assert cuda.match((tail, "unknown"), (UUIDS[0], f"MIG-{tail.upper()}")) == (f"MIG-{tail}",)


def test_a_process_that_has_opened_a_gpu_is_given_that_one_again(
    library: Path, fake: FakeScript, tmp_path: Path
) -> None:
    """Of two free GPUs it takes one, opens it, and then never the other one."""
    script = FakeScript(fake.path, gpus=2)
    for place, uuid in enumerate(UUIDS):
        script.change(place, uuid=uuid)
    code = (
        "from gpusched_ipy import gpuqueue\n"
        "with gpuqueue(on_gpu=1) as gpu: print(gpu.uuid); cu.cuInit(0)\n"
        "with gpuqueue() as gpu: print(gpu.uuid)\n"
        "with gpuqueue() as gpu: print(gpu.uuid)\n"
    )
    assert said(code, library) == [UUIDS[1]] * 3


def test_a_process_that_had_opened_cuda_before_uses_the_first_gpu(
    library: Path, fake: FakeScript
) -> None:
    """The variable no longer counts: libraries take the first GPU that they see."""
    script = FakeScript(fake.path, gpus=2)
    for place, uuid in enumerate(reversed(UUIDS)):
        script.change(place, uuid=uuid)
    code = "cu.cuInit(0)\nfrom gpusched_ipy import gpuqueue\nwith gpuqueue() as g: print(g.uuid)"
    assert said(code, library) == [UUIDS[0]]
