"""What a service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from meiqa.types import Assessment

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """Counters, gauges and histograms of one service, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "meiqa_requests", "Requests answered.", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "meiqa_request_seconds",
            "From a request's first byte to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.refused = Counter(
            "meiqa_refused", "Requests refused, by the problem.", ("problem",), registry=registry
        )
        self.queue_seconds = Histogram(
            "meiqa_queue_seconds",
            "How long a request waited for an engine.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "meiqa_stage_seconds",
            "Stages of an assessment; `total` is all of them.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.scores = Histogram(
            "meiqa_score",
            "Scores given.",
            buckets=(1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5),
            registry=registry,
        )
        self.degraded = Counter(
            "meiqa_degraded", "Assessments that left something out.", registry=registry
        )
        self.late = Counter(
            "meiqa_late", "Answers that came after their deadline.", registry=registry
        )
        self.waiting = Gauge("meiqa_waiting", "Requests that wait.", registry=registry)
        self.held_bytes = Gauge(
            "meiqa_held_bytes", "Bytes of uploads that are held.", registry=registry
        )
        self.least_seconds = Gauge(
            "meiqa_least_seconds", "Time kept for every photo that waits.", registry=registry
        )

    def assessed(self, result: Assessment) -> None:
        """Count an assessment."""
        self.scores.observe(result.score)
        if result.degraded:
            self.degraded.inc()
        for stage, ms in result.timings_ms.items():
            if stage != "queue":
                self.stage_seconds.labels(stage).observe(ms / 1e3)

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)
