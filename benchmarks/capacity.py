"""How many machines a load takes, in closed form: rates of the stages, and the waiting of a queue with several servers.

A page passes the router (processor time, and a line on the log's disk) and one student machine (tokenising on its
cores, the encoder on an accelerator or on the same cores). Costs grow with the number of tokens: the part of attention
that grows with the square of a pair's length is left out, which short pairs allow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ranking.errors import InputError

# what a figure is called, where it stands, and how the page writes it; the groups are figures
_PAGES = {
    "tokenising": (
        "encoder_calls.md",
        r"lists of (\d+) judged MSRD test documents.*?median of\s+(\d+) tokens a pair.*?takes ([\d.]+) and ([\d.]+) ms",
    ),
    "encoder": (
        "serving.md",
        r"pairs of (\d+) tokens.*?\| limit: encoder alone, tokens made beforehand \| 48 \|.*?([\d.]+) \| [\d.]+ \|\n",
    ),
    "router": ("router.md", r"processor time is about ([\d.]+) ms a page"),
    "log": ("router.md", r"The same pages \((\d+) documents.*?([\d.]+) KB of JSON"),
}


@dataclass(frozen=True)
class Rates:
    """What one unit of work costs.

    tokenise_ms, encode_ms: processor milliseconds of one core, a token of a pair. router_ms: the same, a page.
    log_bytes: of an exposure's line, a document with its text. sources: figure -> where it was taken from.
    """

    tokenise_ms: float
    encode_ms: float
    router_ms: float
    log_bytes: float
    sources: dict[str, str]

    @classmethod
    def measured(cls, results: Path) -> Rates:
        """Read the figures from the pages of docs/results. InputError names the page that lacks one."""
        found, sources = {}, {}
        for name, (page, pattern) in _PAGES.items():
            path = results / page
            try:
                match = re.search(pattern, path.read_text(encoding="utf-8"), re.DOTALL)
            except OSError as problem:
                raise InputError(f"{path}: cannot be read: {problem.strerror}") from problem
            if match is None:
                raise InputError(
                    f"{path}: no figure for {name} in the words that this program knows; give it as a flag"
                )
            found[name], sources[name] = [float(group) for group in match.groups()], str(path)
        documents, tokens, *times = found["tokenising"]
        return cls(
            tokenise_ms=max(times) / (documents * tokens),
            encode_ms=found["encoder"][1] / found["encoder"][0],
            router_ms=found["router"][0],
            log_bytes=found["log"][1] * 1000 / found["log"][0],
            sources=sources,
        )


@dataclass(frozen=True)
class Load:
    """What is asked at the daily peak: pages a second, documents of a page, tokens of a (query, document) pair."""

    requests_per_second: float
    candidates: int
    tokens: int

    @property
    def list_tokens(self) -> int:
        """Tokens of one page."""
        return self.candidates * self.tokens


@dataclass(frozen=True)
class StudentMachine:
    """One student replica's machine.

    cores: for tokenising, and for the encoder where there is no accelerator. encoder_tokens_per_second: of the
    accelerator, None without. call_ms: fixed time of one encoder call. merged_lists: lists that one call may take.
    """

    cores: int
    encoder_tokens_per_second: float | None = None
    call_ms: float = 0.0
    merged_lists: int = 1

    def stages(self, load: Load, rates: Rates) -> dict[str, float]:
        """Pages a second that each stage bears alone, at full calls."""
        tokenise = rates.tokenise_ms * load.list_tokens / 1e3
        if self.encoder_tokens_per_second is None:
            encode = rates.encode_ms * load.list_tokens / 1e3 + self.call_ms / 1e3 / self.merged_lists * self.cores
            return {"tokenising and encoder (one set of cores)": self.cores / (tokenise + encode)}
        encode = load.list_tokens / self.encoder_tokens_per_second + self.call_ms / 1e3 / self.merged_lists
        return {"tokenising": self.cores / tokenise, "encoder": 1 / encode}

    def idle_seconds(self, load: Load, rates: Rates) -> float:
        """How long a page takes on an idle machine: one core tokenises, then one call encodes."""
        tokenise = rates.tokenise_ms * load.list_tokens / 1e3
        if self.encoder_tokens_per_second is None:
            return tokenise + self.call_ms / 1e3 + rates.encode_ms * load.list_tokens / 1e3 / self.cores
        return tokenise + self.call_ms / 1e3 + load.list_tokens / self.encoder_tokens_per_second


@dataclass(frozen=True)
class Router:
    """One router process with its log's disk: one core, and what that disk writes for good."""

    disk_mb_per_second: float

    def stages(self, load: Load, rates: Rates) -> dict[str, float]:
        """Pages a second that each stage bears alone."""
        line = rates.log_bytes * load.candidates
        return {"router": 1e3 / rates.router_ms, "log disk": self.disk_mb_per_second * 1e6 / line}


@dataclass(frozen=True)
class Waiting:
    """A queue before equal servers. share: of requests that wait at all; mean: seconds of waiting, of all requests."""

    share: float
    mean: float

    def at(self, quantile: float) -> float:
        """Seconds that this share of the requests waits at most (the tail is taken as exponential)."""
        left = 1 - quantile
        return 0.0 if self.share <= left else self.mean / self.share * math.log(self.share / left)

    def longer_than(self, seconds: float) -> float:
        """Share of requests that wait longer."""
        if seconds <= 0:
            return 1.0 if seconds < 0 else self.share
        return self.share * math.exp(-seconds * self.share / self.mean) if self.mean else 0.0


def waiting(servers: int, arrivals_per_second: float, service_seconds: float, variation: float = 0.0) -> Waiting:
    """Poisson arrivals at `servers` servers with one queue.

    Erlang's C formula, with Lee and Longton's factor (1 + variation) / 2 for service times that are not exponential
    (variation: their squared coefficient of variation; 0 is always the same time, 1 is exponential and exact). A load
    that the servers do not bear waits for ever: share 1, mean infinite.
    """
    offered = arrivals_per_second * service_seconds
    if offered >= servers:
        return Waiting(1.0, math.inf)
    blocked = 1.0  # Erlang B, by its recursion: factorials of hundreds of servers overflow
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    share = blocked / (1 - offered / servers * (1 - blocked))
    return Waiting(share, share * service_seconds / (servers - offered) * (1 + variation) / 2)


def smallest(holds: Callable[[int], bool]) -> int:
    """The smallest number from 1 on for which `holds` is true; it must be false below it and true from it on."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
