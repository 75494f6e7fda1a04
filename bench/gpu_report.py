"""What is made of the GPU run's rows: verdicts on the aims, summaries of accuracy and hazards, tables and CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.gpu_cases import GUARANTEED, WORKLOADS, Aim
from bench.gpu_jobs import Row
from bench.results import ms

EQUAL = 1e-5  # an error below this counts as equal to any other
ACCURACY = ("operation", "shape", "sigma0", "points", "mode", "median", "most", "worst", "allowed", "ok", "absent")
CASES = (
    "case", "contender", "ours", "mode", "median", "lower", "upper", "fastest", "turns", "first", "error_median",
    "error_most", "error_worst", "extra_memory", "share_of_copy", "share_of_bf16", "share_of_float32", "best_peer",
    "ratio_to_best_peer", "absent",
)  # fmt: skip
AIMS = ("case", "ours", "ours_ms", "best_peer", "best_peer_ms", "ratio", "aim", "met", "reason", "error_worst")


def verdicts(cases: Sequence[Row], checked: Sequence[Row], *, rehearsal: bool = False) -> list[Row]:
    """One row per aim of every workload, on errors and on memory: met is True, False, or None with the reason.

    Args:
        cases: rows of the benchmark. checked: rows of errors.
    """
    found = {row["case"]: row for row in cases if "contenders" in row}
    rows = [_verdict(w.name, aim, found.get(w.name)) for w in WORKLOADS for aim in w.aims]
    rows += [_accurate(mode, checked) for mode in ("highest", "high")] + [_frugal(cases)]
    return [{**row, "met": None, "reason": row["reason"] or "a rehearsal"} for row in rows] if rehearsal else rows


def _verdict(name: str, aim: Aim, row: Row | None) -> Row:
    shown: Row = {"case": name, "ours": aim.by, "aim": aim.words(), "met": None, "reason": "not reached in this run"}
    shown |= dict.fromkeys(("ours_ms", "best_peer", "best_peer_ms", "ratio", "error_worst"))
    if row is None:
        return shown
    ran, absent = row["contenders"], row["absent"]
    if aim.by not in ran:
        return {**shown, "reason": f"{aim.by}: {absent.get(aim.by, 'not run')}"}
    one = ran[aim.by]
    shown |= {"ours_ms": 1e3 * one["median"], "error_worst": one["error_worst"], "reason": ""}
    best = best_peer(row, aim.by) if aim.peer is None else aim.peer
    if best is not None and best in ran:
        shown |= {"best_peer": best, "best_peer_ms": 1e3 * ran[best]["median"]}
        shown["ratio"] = ran[best]["median"] / one["median"]
    if aim.milliseconds is not None:
        return {**shown, "met": shown["ours_ms"] <= aim.milliseconds}
    if aim.times is None or best is None or best not in ran:
        return {**shown, "reason": f"{aim.peer}: {absent.get(aim.peer or '', 'not run')}"}
    if not _at_least_as_accurate(one, ran[best]):
        return {**shown, "met": False, "reason": f"less accurate than {best}"}
    if aim.worst is not None and not (one["error_worst"] is not None and one["error_worst"] <= aim.worst):
        return {**shown, "met": False, "reason": f"error above {aim.worst:g}"}
    return {**shown, "met": shown["ratio"] >= aim.times}


def _accurate(mode: str, checked: Sequence[Row]) -> Row:
    """Every float32 result at a point, at every sigma0."""
    errors = [_infinite(row["worst"]) for row in checked if row["mode"] == mode and row.get("allowed") == EQUAL]
    shown: Row = {"case": "errors", "ours": f"flowfast, {mode}", "aim": f"every error <= {EQUAL:g}"}
    shown |= dict.fromkeys(("ours_ms", "best_peer", "best_peer_ms", "ratio", "error_worst"))
    if not errors:
        return {**shown, "met": None, "reason": "not reached in this run"}
    worst = max(errors)
    return {**shown, "met": worst <= EQUAL, "reason": f"{worst:.1e} in {len(errors)} rows"}


def _frugal(cases: Sequence[Row]) -> Row:
    extra = [
        one["extra_memory"] - row["written"]
        for row in cases
        for one in row["contenders"].values()
        if one["ours"] and one["extra_memory"] is not None
    ]
    shown: Row = {"case": "memory", "ours": "flowfast", "aim": f"<= result + {GUARANTEED >> 20} MiB"}
    shown |= dict.fromkeys(("ours_ms", "best_peer", "best_peer_ms", "ratio", "error_worst"))
    if not extra:
        return {**shown, "met": None, "reason": "not reached in this run"}
    return {**shown, "met": max(extra) <= GUARANTEED, "reason": f"{max(extra) / 2**20:.0f} MiB beside the result"}


def best_peer(row: Row, ours: str) -> str | None:
    """The fastest peer of a case that is as accurate as `ours`, or accurate to EQUAL."""
    ran = row["contenders"]
    peers = [name for name, one in ran.items() if not one["ours"] and _at_least_as_accurate(one, ran[ours])]
    return min(peers, key=lambda name: ran[name]["median"], default=None)


def _at_least_as_accurate(one: Row, other: Row) -> bool:
    mine, theirs = (_infinite(row["error_most"]) for row in (one, other))
    return mine <= max(EQUAL, theirs) and mine < float("inf")


def _infinite(error: float | None) -> float:
    return float("inf") if error is None else error


def memory(cases: Iterable[Row]) -> list[Row]:
    """Ours that took more than the result and GUARANTEED bytes."""
    return [
        {"case": row["case"], "contender": name, "extra_memory": one["extra_memory"], "written": row["written"]}
        for row in cases
        for name, one in row.get("contenders", {}).items()
        if one["ours"] and one["extra_memory"] is not None and one["extra_memory"] > row["written"] + GUARANTEED
    ]


def accuracy(rows: Sequence[Row]) -> list[Row]:
    """Worst errors over shapes and points: a row per operation and mode, a number per sigma0; how many are wrong."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["operation"], row["mode"])
        one = found.setdefault(key, {"operation": key[0], "mode": key[1], "worst": {}, "wrong": 0, "absent": 0})
        if "absent" in row:
            one["absent"] += 1
            continue
        sigma0 = f"{row['sigma0']:g}"
        worst = max(_infinite(row["worst"]), _infinite(one["worst"].get(sigma0, 0.0)))
        one["worst"][sigma0] = worst if worst < float("inf") else None
        one["wrong"] += not row["ok"]
    return list(found.values())


def contenders(cases: Iterable[Row]) -> list[Row]:
    """A row per contender of every case, those that did not run with the reason."""
    rows = []
    for case in cases:
        for name, one in case.get("contenders", {}).items():
            best = best_peer(case, name) if one["ours"] else None
            ratio = None if best is None else case["contenders"][best]["median"] / one["median"]
            rows.append(
                {"case": case["case"], "contender": name, **one, "best_peer": best, "ratio_to_best_peer": ratio}
            )
        rows += [
            {"case": case["case"], "contender": name, "absent": why} for name, why in case.get("absent", {}).items()
        ]
    return rows


def as_csv(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Comma-separated values, the columns that are named."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(report: dict[str, Any], cases: Sequence[Row]) -> list[Table]:
    """The run on a screen: accuracy, every case, the aims, the steps."""
    shown = []
    summary = report["accuracy"]
    sigmas = list(dict.fromkeys(sigma0 for row in summary for sigma0 in row["worst"]))
    accurate = _table("worst error against float64", ["operation", "mode", *sigmas, "wrong", "absent"])
    for row in summary:
        errors = [_error(row["worst"][sigma0]) if sigma0 in row["worst"] else "" for sigma0 in sigmas]
        accurate.add_row(row["operation"], row["mode"], *errors, str(row["wrong"]), str(row["absent"]))
    shown.append(accurate)
    headings = [
        "",
        "median ms",
        "quartiles",
        "turns",
        "first s",
        "of copy",
        "of bf16",
        "of float32",
        "error",
        "worst",
        "MiB",
    ]
    for case in cases:
        table = _table(case["title"], headings)
        for name, one in case["contenders"].items():
            shares = [one[f"share_of_{kind}"] for kind in ("copy", "bf16", "float32")]
            table.add_row(
                name, ms(one["median"]), f"{ms(one['lower'])}-{ms(one['upper'])}", str(one["turns"]),
                f"{one['first']:.2f}", *("" if share is None else f"{share:.1%}" for share in shares),
                _error(one["error_median"]), _error(one["error_worst"]),
                "" if one["extra_memory"] is None else f"{one['extra_memory'] / 2**20:.0f}",
                style="bold" if one["ours"] else None,
            )  # fmt: skip
        table.caption = "; ".join(f"{name}: {why}" for name, why in case["absent"].items())
        shown.append(table)
    aims = _table("aims", ["case", "ours", "ms", "peer", "ms", "ratio", "aim", "met", "worst error"])
    for row in report["aims"]:
        met = {True: "yes", False: "NO", None: "not measured"}[row["met"]]
        aims.add_row(
            row["case"], row["ours"], _number(row["ours_ms"]), row["best_peer"] or "", _number(row["best_peer_ms"]),
            _number(row["ratio"]), row["aim"], f"{met} ({row['reason']})" if row["reason"] else met,
            "" if row["ours_ms"] is None else _error(row["error_worst"]),
        )  # fmt: skip
    shown.append(aims)
    steps = _table("steps", ["step", "state", "seconds", "limit", "what"])
    for name, step in report["steps"].items():
        steps.add_row(name, step["state"], f"{step['seconds']:.0f}", str(step["limit"]), step["summary"])
    shown.append(steps)
    return shown


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}"
