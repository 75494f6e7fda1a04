"""JSON from files that nobody vouches for: small, without surprises, refused in one sentence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any


def parse_object(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Args:
        content: UTF-8, already limited in size by the caller. what: for messages, the file's path.

    Raises:
        ValueError: no JSON object, a name given twice, NaN or infinity, nesting or numbers beyond Python's limits.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read as JSON ({_short(error)}): restore the file") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must hold a JSON object; it holds a {type(value).__name__}: restore the file")
    return value


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raise ValueError, naming them, when names are missing or unknown."""
    found, expected = set(found), set(expected)
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        said = [
            f"{word} {', '.join(map(repr, names[:4]))}"
            for word, names in (("no", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(f"{what} must hold {', '.join(sorted(expected))}; got {_short('; '.join(said))}")


def dump_object(value: dict[str, Any]) -> bytes:
    """Sorted names, one line per field, a newline at the end: the same value gives the same bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} is given twice")
    return value


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no number here")


def _short(said: object) -> str:
    text = str(said)
    return text if len(text) <= 120 else f"{text[:117]}..."
