"""What moved between two benchmark files: plain JSON in, plain rows out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAME = ("processor", "instruction_set", "threads", "versions")  # facts without which times do not compare


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Medians of two runs side by side, contenders that both timed.

    Args:
        before, after: files that `make bench` wrote.

    Returns:
        "differs": facts of the machine that are not the same in both. "rows": one per case and contender, with
        "before" and "after" in seconds, "ratio" after / before, "apart" whether the ranges between quartiles
        do not overlap. "only_before", "only_after": "case, contender" timed in one file alone.

    Raises:
        ValueError: a file that is missing, or is no benchmark result.
    """
    old, new = _load(before), _load(after)
    first, second = _timings(old, before), _timings(new, after)
    rows = []
    for key in first:
        if key in second:
            one, other = first[key], second[key]
            apart = other["lower"] > one["upper"] or other["upper"] < one["lower"]
            ratio = other["median"] / one["median"]
            rows.append(
                {"case": key[0], "contender": key[1], "before": one["median"], "after": other["median"]}
                | {"ratio": ratio, "apart": apart}
            )
    return {
        "differs": [name for name in SAME if old.get(name) != new.get(name)],
        "rows": rows,
        "only_before": [", ".join(key) for key in first if key not in second],
        "only_after": [", ".join(key) for key in second if key not in first],
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise ValueError(f"{path} cannot be read ({reason})") from error
    if not isinstance(found, dict) or not isinstance(found.get("cases"), dict):
        raise ValueError(f"{path} is no benchmark result: it has no cases; make bench writes one")
    return found


def _timings(found: dict[str, Any], path: Path) -> dict[tuple[str, str], dict[str, float]]:
    try:
        return {
            (case, name): {key: float(row[key]) for key in ("median", "lower", "upper")}
            for case, result in found["cases"].items()
            for name, row in result["contenders"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no benchmark result of this version: {error} is missing in a case") from error
