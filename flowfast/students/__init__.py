"""Few-step students: networks that replace the segments of a probability flow. They are given numbers only."""

from flowfast.students.flow_student import FlowStudent as FlowStudent
from flowfast.students.flow_student import SegmentTable as SegmentTable
from flowfast.students.mlp import MLP as MLP
from flowfast.students.residual import ResidualFlowMap as ResidualFlowMap
from flowfast.students.transformer import TransformerFlowMap as TransformerFlowMap
