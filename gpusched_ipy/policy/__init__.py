"""Which job starts on which GPU now, and why each other one waits: state in, decision out."""

from gpusched_ipy.policy.decision import (
    REASONS,
    Decision,
    Line,
    Reservation,
    Start,
    backlog_s,
    confirm,
    decide,
    reason_for,
)

__all__ = [
    "REASONS",
    "Decision",
    "Line",
    "Reservation",
    "Start",
    "backlog_s",
    "confirm",
    "decide",
    "reason_for",
]
