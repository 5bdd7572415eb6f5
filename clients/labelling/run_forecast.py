"""--dry-run: what a labelling run will take in tokens, hours and money, from a count and a short probe of the
servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.label_ranges import Job, label_ranges
from clients.labelling.work_queue import Tally
from ranking.errors import InputError
from ranking.text import TeacherFormat

COUNTED = 20_000  # pairs whose tokens are counted; a larger file is estimated from this many, spread over it
PROBE_SECONDS = 10.0
PROBE_SHARDS = 4


@dataclass(frozen=True)
class RunForecast:
    """tokens: of all prompts, None for a ranker, whose server tokenises; exact: every pair was counted; rate: pairs a
    second of all endpoints together."""

    pairs: int
    tokens: int | None
    prefix_tokens: int  # of them, query parts that an earlier candidate of the query already had
    exact: bool
    rate: float
    endpoints: int
    price_per_hour: float | None

    @property
    def hours(self) -> float:
        """Hours that the run takes at this rate."""
        return self.pairs / self.rate / 3600

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        lines = [f"pairs   {self.pairs}"]
        if self.tokens is not None:
            lines.append(
                f"tokens  {about}{self.tokens} ({self.tokens / max(1, self.pairs):.1f} a pair; "
                f"{self.prefix_tokens / max(1, self.tokens):.0%} are a query seen just before, "
                "which the prefix cache may save)"
            )
        lines += [
            f"time    {self.hours:.2f} hours at {self.rate:.1f} pairs/s over {self.endpoints} endpoint(s)",
        ]
        if self.price_per_hour is not None:
            cost = self.hours * self.endpoints * self.price_per_hour
            lines.append(f"cost    {cost:.2f} at {self.price_per_hour:g} an hour and endpoint")
        return "\n".join(lines)


def count_tokens(candidates: CandidateFile, text_format: TeacherFormat) -> tuple[int, int, int]:
    """(tokens, tokens of repeated query parts, pairs they were counted on), over at most COUNTED pairs."""
    pieces = 20 if candidates.rows > COUNTED else 1
    each = min(candidates.rows, COUNTED) // pieces
    step = candidates.rows // pieces
    tokens = repeated = pairs = 0
    ranges = [RowRange(i, i * step, each) for i in range(pieces)] if candidates.rows else []
    for _, rows, refused in candidates.read(ranges):
        sound = [i for i in range(len(rows)) if i not in refused]
        fields = [
            [column[i] for i in sound] for column in (rows.column(c).to_pylist() for c in ("query", "title", "summary"))
        ]
        texts = text_format.texts(*fields)
        lengths = [len(e.ids) for e in text_format.tokenizer.encode_batch([t.text for t in texts])]
        heads = [
            len(e.ids)
            for e in text_format.tokenizer.encode_batch([t.text[: t.document_start_character] for t in texts])
        ]
        tokens += sum(lengths)
        repeated += sum(head for i, head in enumerate(heads) if i and fields[0][i] == fields[0][i - 1])
        pairs += len(sound)
    return tokens, repeated, pairs


def forecast(
    candidates: CandidateFile, text_format: TeacherFormat | None, rate: float, endpoints: int, price: float | None
) -> RunForecast:
    """Scale the counted tokens to the whole file; none are counted without a text format."""
    if text_format is None:
        return RunForecast(candidates.rows, None, 0, True, rate, endpoints, price)
    tokens, repeated, counted = count_tokens(candidates, text_format)
    share = candidates.rows / counted if counted and candidates.rows > COUNTED else 1.0
    exact = candidates.rows <= COUNTED
    return RunForecast(candidates.rows, round(tokens * share), round(repeated * share), exact, rate, endpoints, price)


def probe(job: Job, scratch: Path, ranges: Sequence[RowRange]) -> float:
    """Pairs a second over all endpoints, measured for about PROBE_SECONDS on the first rows; the labels are thrown
    away.

    The clock starts at the first answer: a cold server's first request is not its rate.
    InputError: no pair got a score.
    """
    tally = Tally()
    began: list[tuple[float, int]] = []
    ended: list[tuple[float, int]] = []

    async def measure() -> None:
        labelling = asyncio.create_task(
            label_ranges(job, ranges[:PROBE_SHARDS], tally, lambda record: None, lambda: False)
        )
        while not labelling.done():
            await asyncio.sleep(0.05)
            now = (monotonic(), tally.scored)
            if tally.scored and not began:
                began.append(now)
            elif began:
                ended[:] = [now]
                if now[0] - began[0][0] > PROBE_SECONDS:
                    labelling.cancel()
                    break
        with contextlib.suppress(asyncio.CancelledError):
            await labelling

    scratch.mkdir(parents=True, exist_ok=True)
    started = monotonic()
    asyncio.run(measure())
    if not tally.scored:
        problem = tally.last_problem or "none of the first can be labelled"
        raise InputError(f"{job.candidates.path}: no pair got a score, so no rate is known: {problem}; give --rate")
    if ended and ended[0][1] > began[0][1]:
        return (ended[0][1] - began[0][1]) / (ended[0][0] - began[0][0])
    return tally.scored / (monotonic() - started)
