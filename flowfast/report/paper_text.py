"""What Tables 3 and 4 say about the published teacher, in generated sentences: no number, no sentence."""

from __future__ import annotations

from collections.abc import Sequence

from flowfast.experiments.paper import CellResult, Summary
from flowfast.report.numbers import number, short

NOISY = 0.1  # sigma0 at and above which the published teacher follows the flow well enough


def findings(summary: Summary, table: int) -> list[str]:
    """Sentences on the published teacher and what changes with an exact one; one says so when runs are missing."""
    pairs = [(dict(cell), found["paper"], found["exact"]) for cell, found in summary.cells(table)]
    if table == 3:
        low = [(cell, paper, exact) for cell, paper, exact in pairs if cell["sigma0"] < NOISY]
    else:
        low = pairs
    said = _teacher_sentence([_own(paper, exact) for _, paper, exact in low], table)
    if summary.variant.scale < 1:
        return [*said, "This is a rehearsal: its students are trained too little to say more."]
    if table == 3:
        for bound in dict.fromkeys(cell["B"] for cell, _, _ in pairs):
            column = sorted(((c["sigma0"], p, e) for c, p, e in pairs if c["B"] == bound), key=lambda x: -x[0])
            said += _trend(f"At B = {short(bound)}, from sigma0", column)
    else:
        said += _trend("From blocks", [(cell["blocks"], paper, exact) for cell, paper, exact in pairs])
    unfinished = sum(one.wanted > 0 and not one.complete for _, paper, exact in pairs for one in (paper, exact))
    absent = sum(one.wanted == 0 for _, paper, exact in pairs for one in (paper, exact))
    if unfinished or absent:
        said.append(
            f"Of this table's {2 * len(pairs)} cells under two teachers {unfinished} have not finished and {absent} "
            "were not asked for: what is missing is not judged here."
        )
    return said


def _own(paper: CellResult, exact: CellResult) -> float | None:
    value = paper.mean("teacher_error")
    return exact.mean("teacher_error") if value is None else value


def _teacher_sentence(errors: Sequence[float | None], table: int) -> list[str]:
    known = [error for error in errors if error is not None]
    if not known:
        return []
    where = f"Below sigma0 = {NOISY:g}" if table == 3 else "At sigma0 = 0.001"
    span = number(min(known)) if min(known) == max(known) else f"{number(min(known))} to {number(max(known))}"
    if min(known) > 1:
        verdict = "it has left the flow by more than the flow's own norm; what students learned from it is another map"
    else:
        verdict = "students are compared with the flow to that accuracy, no better"
    return [f"{where} the published teacher's own relative squared error against the exact flow is {span}: {verdict}."]


def _trend(what: str, column: Sequence[tuple[float, CellResult, CellResult]]) -> list[str]:
    """How the error moves from the first to the last row: published, as published, exact."""
    (start, *first), (end, *last) = column[0], column[-1]
    steps = [("published", first[0].published["error"].mean, last[0].published["error"].mean)]
    for name, index in (("ours as published", 0), ("ours with the exact teacher", 1)):
        one, other = first[index].mean(), last[index].mean()
        if one is not None and other is not None:
            steps.append((name, one, other))
    if len(steps) == 1:
        return []
    told = "; ".join(f"{name} {number(one)} to {number(other)}, it {_moves(one, other)}" for name, one, other in steps)
    return [f"{what} = {short(start)} to {short(end)} the error goes: {told}."]


def _moves(one: float, other: float) -> str:
    """A factor below two is no trend; one seed would not bear more."""
    if other > 2 * one:
        return f"grows {number(other / one)}-fold"
    if one > 2 * other:
        return f"falls {number(one / other)}-fold"
    return "changes by less than a factor of two"
