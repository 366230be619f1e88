"""The live panel and the still pictures: what a person sees of GPUs and queue in a notebook."""

from gpusched_ipy.panel.panel import GpuPanel, close_all, panel_of

__all__ = ["GpuPanel", "close_all", "panel_of"]
