"""Prometheus metrics of the A/B router (docs/ab-router.md says which of them to alert on)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_LATENCY = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_WRITE = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0)
_PAUSE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """One registry a router, so that several routers can live in one test process."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_*: memory, processor time, open files, time of the start
        self._followed: dict[str, int] = {}
        arm = ("experiment", "arm")
        self.pages = self._make(Counter, "ab_pages", "pages ranked", *arm, "served_by", "fallback")
        self.page_seconds = self._make(Histogram, "ab_page_seconds", "arrival to answer", *arm, buckets=_LATENCY)
        self.model_calls = self._make(Counter, "ab_model_calls", "calls to Triton by outcome", "model", "outcome")
        self.model_seconds = self._make(Histogram, "ab_model_seconds", "time of a call", "model", buckets=_LATENCY)
        self.breaker_open = self._make(Gauge, "ab_breaker_open", "1 while a model is left alone", "model")
        self.coverage = self._make(Gauge, "ab_coverage", "share of users inside, ramp-downs included", "experiment")
        self.ramp_downs = self._make(Counter, "ab_ramp_downs", "coverage cuts by a guardrail", *arm)
        self.events = self._make(Counter, "ab_events", "clicks and dwell times taken", "type")
        self.refused = self._make(Counter, "ab_refused", "requests answered with 4xx or 503", "status")
        self.unread = self._make(Counter, "ab_unread_answers", "connections closed since nobody read the answer")
        self.given_up = self._make(Counter, "ab_given_up_connections", "waiting connections closed to make room")
        self.shadows = self._make(Counter, "ab_shadows", "shadow calls by outcome", "model", "outcome")
        self.log_seconds = self._make(Histogram, "ab_log_seconds", "wait for the log to be on disk", buckets=_WRITE)
        self.log_failures = self._make(Counter, "ab_log_failures", "records that could not be written")
        self.log_pending = self._make(Counter, "ab_log_pending", "answers that left before the log was on disk")
        self.log_waiting = self._make(Gauge, "ab_log_waiting_records", "records queued for the disk")
        self.log_stalled = self._make(Gauge, "ab_log_stalled_seconds", "how long the write under way takes already")
        self.loop_pause = self._make(Histogram, "ab_loop_pause_seconds", "pauses of the event loop", buckets=_PAUSE)
        self.longest_pause = self._make(Gauge, "ab_loop_pause_longest_seconds", "the longest pause since the start")
        self.renewals = self._make(Counter, "ab_connection_renewals", "connections to Triton given up as silent")
        self.spans_dropped = self._make(Counter, "ab_spans_dropped", "spans of tracing that no collector took")
        self.file_errors = self._make(
            Gauge, "ab_experiment_file_error", "1 while the experiment file or the keys are refused"
        )

    def follow(self, name: str, total: int) -> None:
        """Raise the counter `name` to a total that is counted elsewhere."""
        counter: Counter = getattr(self, name)
        counter.inc(total - self._followed.get(name, 0))
        self._followed[name] = total

    def _make(self, kind, name: str, text: str, *labels: str, **options):
        return kind(name, text, labels, registry=self.registry, **options)
