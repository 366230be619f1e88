"""Arguments that look as if they held a secret: every user of the machine can read them. Pure.

It only warns, and never repeats what it has found. The values of ``--env`` are kept from others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

# Options and variables whose value is a secret: "--token", "--api-key", "DB_PASSWORD".
# "tokens", "tokenizer", "key-dim" and the like are the trade's own words.
_NAME = re.compile(
    r"(^|[-_.])("
    r"(api|access|secret|private|auth|ssh|account|encryption|signing)[-_]?keys?|apikey"
    r"|token|secret|passwd|password|passphrase|pwd|credentials?"
    r")$",
    re.IGNORECASE,
)
# Secrets that are known by their beginning, as their makers document them.
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])("
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY"
    r")"
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?:^|\s)(-{0,2}[A-Za-z][\w.-]*)=(\S+)")
_FOLLOWED = re.compile(r"(?:^|\s)(-{1,2}[A-Za-z][\w.-]*)\s+([^-\s]\S*)")


def warning(argv: Sequence[str]) -> str | None:
    """One line about what in ``argv`` looks like a secret; None where nothing does."""
    found = _named(argv)
    if found is None and any(_VALUE.search(word) or _URL.search(word) for word in argv):
        found = "an argument"
    if found is None:
        return None
    return (
        f"{found} looks like a secret: every user of this machine can read a command's arguments, "
        "and the record keeps them; give it by --env NAME instead"
    )


def _named(argv: Sequence[str]) -> str | None:
    """The option or variable by whose name its value is a secret."""
    for word in argv:
        for match in _ASSIGNED.finditer(word):
            if _tells(match[1], match[2]):
                return match[1]
        for match in _FOLLOWED.finditer(word):
            if _tells(match[1], match[2]):
                return match[1]
    for option, value in pairwise(argv):
        if option.startswith("-") and not value.startswith("-") and _tells(option, value):
            return option
    return None


def _tells(name: str, value: str) -> bool:
    # "$TOKEN" is read by the shell of the job, and a number counts something.
    return bool(_NAME.search(name)) and not value.startswith("$") and not value.isdigit()
