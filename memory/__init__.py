"""What is remembered: anchors with human scores, and cases learned online.

>>> from meiqa.memory import RetrievalPolicy
>>> RetrievalPolicy(k=16).bins
5
"""

from meiqa.memory.anchor_writer import AnchorWriter
from meiqa.memory.bank import Case, MemoryBank, Snapshot
from meiqa.memory.generation import holds_anchors, package_digest_of
from meiqa.memory.keys import key_widths, retrieval_key
from meiqa.memory.likeness import NEAR_DUPLICATE, layout
from meiqa.memory.policies import Admission, ContrastPolicy
from meiqa.memory.records import Record
from meiqa.memory.regression import FEWEST_PHOTOS, Regression, token_features
from meiqa.memory.retrieval import RetrievalPolicy
from meiqa.memory.segment import Segment, write_segment
from meiqa.memory.statistics import MemoryStatistics
from meiqa.memory.verification import Finding, verify_memory

__all__ = [
    "FEWEST_PHOTOS",
    "NEAR_DUPLICATE",
    "Admission",
    "AnchorWriter",
    "Case",
    "ContrastPolicy",
    "Finding",
    "MemoryBank",
    "MemoryStatistics",
    "Record",
    "Regression",
    "RetrievalPolicy",
    "Segment",
    "Snapshot",
    "holds_anchors",
    "key_widths",
    "layout",
    "package_digest_of",
    "retrieval_key",
    "token_features",
    "verify_memory",
    "write_segment",
]
