"""The theorems of arXiv 2606.03820 as objects that run: networks that are built, not trained, beside their bounds."""

from flowfast.theory.audit import Audit, audit_network
from flowfast.theory.composition import ResidualComposition
from flowfast.theory.score_net import ConstructiveScoreNet

__all__ = ["Audit", "ConstructiveScoreNet", "ResidualComposition", "audit_network"]
