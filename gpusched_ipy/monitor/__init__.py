"""The GPUs as this process sees them: one abandonable sampler thread, and a short history."""

from gpusched_ipy.monitor.monitor import Monitor

__all__ = ["Monitor"]
