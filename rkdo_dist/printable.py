"""Text for a terminal: a name or a message that holds control characters must not steer it, and is always written."""

from __future__ import annotations

import re

# Of C0 (but a line break) and C1, what turns the direction of writing, breaks of lines and paragraphs, lone surrogates.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with what would steer a terminal, or cannot be written, as Python writes it: "\\x1b". Lines stay lines."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def shortened(text: str) -> str:
    """`text` as a message quotes it: at most 40 characters."""
    return text if len(text) <= 40 else f"{text[:37]}..."
