"""What is remembered: anchors with human scores, and cases learned online.

>>> from meiqa.memory import RetrievalPolicy
>>> RetrievalPolicy(k=16).bins
5
"""

from meiqa.memory.anchors import AnchorMemory, AnchorWriter
from meiqa.memory.bank import Case, MemoryBank, Snapshot
from meiqa.memory.contrast import ContrastMemory
from meiqa.memory.retrieval import RetrievalPolicy
from meiqa.memory.segment import Segment, write_segment

__all__ = [
    "AnchorMemory",
    "AnchorWriter",
    "Case",
    "ContrastMemory",
    "MemoryBank",
    "RetrievalPolicy",
    "Segment",
    "Snapshot",
    "write_segment",
]
