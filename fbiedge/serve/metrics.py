"""What Prometheus is told at /metrics. Every name begins with `fbiedge_`, besides those of the process itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .scheduler import Finished, Scheduler, Ticket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "fbiedge_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self._prompt = Counter("fbiedge_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter("fbiedge_cached_prompt_tokens", "Of these, found in a KV cache", registry=registry)
        self._generated = Counter("fbiedge_generated_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "fbiedge_time_to_first_token_seconds", "From the request to its first token, the queue included",
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self._duration = Histogram(
            "fbiedge_request_seconds", "From the request to the end of its answer", registry=registry, buckets=_SECONDS
        )
        running = Gauge("fbiedge_answers_running", "Answers being generated", registry=registry)
        running.set_function(lambda: scheduler.running)
        waiting = Gauge("fbiedge_answers_waiting", "Answers in the queue", registry=registry)
        waiting.set_function(lambda: scheduler.waiting)
        Gauge("fbiedge_slots", "Answers that can be generated at a time", registry=registry).set(scheduler.slots)

    def request(self, path: str, status: int) -> None:
        """One was answered, or not."""
        self._requests.labels(path, str(status)).inc()

    def finished(self, ticket: Ticket, ends: list[Finished], now: float) -> None:
        """The answers of one request; those that were given up don't count."""
        for end in ends:
            self._prompt.inc(end.stats.prompt_tokens)
            self._cached.inc(end.stats.cached_tokens)
            self._generated.inc(end.stats.generated_tokens)
        if ticket.first_token is not None:
            self._first.observe(ticket.first_token - ticket.submitted)
        self._duration.observe(now - ticket.submitted)

    def text(self) -> bytes:
        """The answer of /metrics."""
        return generate_latest(self._registry)
