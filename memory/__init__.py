"""What is remembered: anchors with human scores, and cases learned online.

>>> from meiqa.memory import RetrievalPolicy
>>> RetrievalPolicy(k=16).bins
5
"""

from meiqa.memory.anchor_writer import AnchorWriter
from meiqa.memory.bank import Admission, ContrastPolicy, MemoryBank, create_memory, open_memory
from meiqa.memory.cases import FEWEST_PHOTOS, Case, Record, Regression, token_features
from meiqa.memory.maintenance import Finding, MemoryStatistics, verify_memory
from meiqa.memory.retrieval import (
    NEAR_DUPLICATE,
    RetrievalPolicy,
    Snapshot,
    key_widths,
    retrieval_key,
    spatial_descriptor,
)
from meiqa.memory.segment import Segment, write_segment
from meiqa.memory.versions import holds_anchors, package_digest_of

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
    "create_memory",
    "holds_anchors",
    "key_widths",
    "open_memory",
    "package_digest_of",
    "retrieval_key",
    "spatial_descriptor",
    "token_features",
    "verify_memory",
    "write_segment",
]
