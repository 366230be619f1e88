"""Wait reasons in words: sentences about GPUs and jobs for people. It decides nothing.

Names of processes, notebooks and jobs are put in as they are; each screen escapes what it shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from gpusched_ipy.job import Allocation, Member, WaitCode, WaitReason
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health
from gpusched_ipy.text import format_bytes, format_duration, format_percent

# What a summary over several GPUs calls each kind of obstacle, the commonest first.
_KINDS = {
    WaitCode.GPU_ALLOCATED: "with jobs of this queue",
    WaitCode.GPU_BUSY: "used by others",
    WaitCode.MEMORY: "short of memory",
    WaitCode.QUIET: "about to be idle",
    WaitCode.RESERVATION: "kept for a job ahead",
}


def gpu_label(gpu: Gpu) -> str:
    """``GPU 0``, or its UUID where it has no number."""
    return f"GPU {gpu.number or gpu.uuid}"


def broken(gpu: Gpu) -> WaitReason:
    """The driver says that the GPU cannot be used."""
    state = gpu.health.value.replace("_", " ")
    detail = gpu.health_text or f"its state is {state}"
    if gpu.health in (Health.OK, Health.ASLEEP):
        detail = f"its compute mode is {gpu.compute_mode}"
    return WaitReason(code=WaitCode.GPU_BUSY, text=f"{gpu_label(gpu)}: {detail}")


def allocated(gpu: Gpu, holder: Allocation) -> WaitReason:
    """A job of ours has the GPU."""
    job = holder.label or f"job {holder.job_id}"
    return WaitReason(code=WaitCode.GPU_ALLOCATED, text=f"{gpu_label(gpu)}: {job} is on it")


def used(
    gpu: Gpu,
    strangers: Sequence[GpuProcess],
    members: Mapping[str, Member],
    share: float | None,
    held: int | None,
) -> WaitReason:
    """Strangers use the GPU: ``share`` of its time (0-1), or ``held`` bytes of its memory."""
    if share is not None:
        what = f"{format_percent(share)} used"
    else:
        what = "used" if held is None else f"{format_bytes(held)} held"
    text = f"{gpu_label(gpu)}: {what} by {_who(strangers, members)}"
    return WaitReason(code=WaitCode.GPU_BUSY, text=text)


def _who(strangers: Sequence[GpuProcess], members: Mapping[str, Member]) -> str:
    if not strangers:
        return "processes that cannot be seen"
    first = max(strangers, key=lambda process: process.mem_bytes or 0)
    more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
    member = members.get(first.member or "")
    if member is not None:
        return f"{member.label} (unqueued){more}"
    user = f", user {first.user}" if first.user else ""
    return f"{first.name or 'a process'} (pid {first.pid}{user}){more}"


def idle_holder(
    gpu: Gpu, holders: Sequence[GpuProcess], members: Mapping[str, Member]
) -> WaitReason:
    """An idle kernel keeps memory that the job needs."""
    first = max(holders, key=lambda process: process.mem_bytes or 0)
    member = members[first.member or ""]
    idle_s = first.idle_s if member.idle_s is None else member.idle_s
    since = "is idle" if idle_s is None else f"has been idle for {format_duration(idle_s)}"
    text = (
        f"{gpu_label(gpu)}: {member.label} holds {format_bytes(first.mem_bytes or 0)} and {since}"
    )
    return WaitReason(code=WaitCode.MEMORY, text=text)


def quiet(gpu: Gpu, wanted_s: float) -> WaitReason:
    """The quiet window runs."""
    so_far = min(gpu.quiet_s or 0.0, wanted_s)
    text = f"{gpu_label(gpu)}: quiet for {round(so_far, 1):g} of {wanted_s:g} s"
    return WaitReason(code=WaitCode.QUIET, text=text)


def memory_short(gpu: Gpu, asked: int, left: int) -> WaitReason:
    """What is declared and measured leaves too little."""
    text = (
        f"{gpu_label(gpu)}: {format_bytes(asked)} asked, {format_bytes(max(0, left))} left to share"
    )
    return WaitReason(code=WaitCode.MEMORY, text=text)


def memory_unknown(gpu: Gpu) -> WaitReason:
    """Without a memory reading jobs cannot share."""
    text = f"{gpu_label(gpu)}: its memory cannot be read, so one job at a time"
    return WaitReason(code=WaitCode.MEMORY, text=text)


def pressure(gpu: Gpu) -> WaitReason:
    """The machine's memory, which the GPU uses, is scarce."""
    text = f"{gpu_label(gpu)}: memory pressure of the machine is {gpu.mem_pressure}"
    return WaitReason(code=WaitCode.MEMORY, text=text)


def kept(gpu: Gpu, job_id: int) -> WaitReason:
    """A reservation of a job ahead."""
    text = f"{gpu_label(gpu)}: kept for job {job_id}, which is ahead"
    return WaitReason(code=WaitCode.RESERVATION, text=text)


@lru_cache(maxsize=1024)
def ahead(count: int) -> WaitReason:
    """Others come first."""
    return WaitReason(code=WaitCode.PRIORITY, text=f"{count} job{'s' if count > 1 else ''} ahead")


def summary(refusals: Sequence[WaitReason], gpus: int, free: int) -> WaitReason:
    """One reason out of one for each GPU that refuses; ``free`` others would take the job."""
    lead = f"needs {gpus} GPUs, {free or 'none'} free; " if gpus > 1 else ""
    if len(refusals) <= 2:
        texts = dict.fromkeys(refusal.text for refusal in refusals)
        return WaitReason(code=refusals[0].code, text=lead + "; ".join(texts))
    kinds = Counter(refusal.code for refusal in refusals)
    counts = [f"{kinds[code]} {words}" for code, words in _KINDS.items() if kinds[code]]
    code = next(code for code in _KINDS if kinds[code])
    stranger = next((item for item in refusals if item.code is not WaitCode.GPU_ALLOCATED), None)
    example = f" ({stranger.text})" if stranger is not None else ""
    text = f"{lead}{len(refusals)} GPUs taken: {', '.join(counts)}{example}"
    return WaitReason(code=code, text=text)


def numbers(ids: Iterable[int]) -> str:
    """``#12, #13``."""
    return ", ".join(f"#{number}" for number in ids)
