"""The paper's tables as data: what is trained in every cell, one runner, one result schema."""

from flowfast.experiments.paper.plan import Request as Request
from flowfast.experiments.paper.plan import is_reproduction as is_reproduction
from flowfast.experiments.paper.runner import Progress as Progress
from flowfast.experiments.paper.runner import pending as pending
from flowfast.experiments.paper.runner import reproduce as reproduce
from flowfast.experiments.paper.summary import CellResult as CellResult
from flowfast.experiments.paper.summary import Summary as Summary
from flowfast.experiments.paper.summary import summarise as summarise
from flowfast.experiments.paper.tables import TABLES as TABLES
from flowfast.experiments.paper.tables import Table as Table

__all__ = [
    "TABLES",
    "CellResult",
    "Progress",
    "Request",
    "Summary",
    "Table",
    "is_reproduction",
    "pending",
    "reproduce",
    "summarise",
]
