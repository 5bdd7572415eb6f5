"""What a load takes: machines, money, what saturates first; and a simulated day beside the closed-form answer.

    python -m benchmarks.plan --requests-per-second 500 --candidates 48 --tokens 96 --price-per-hour 1.2

Rates are read from docs/results, which measured them on two cores without a GPU; flags replace them. With
--encoder-tokens-per-second the encoder is an accelerator's (an A10 that sustains 60 TFLOP/s on an encoder of 43 million
parameters: 60e12 / (2 * 43e6) = 700,000 tokens a second, docs/scale.md), without it runs on the machine's cores.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.capacity import Load, Rates, Router, StudentMachine, smallest, waiting
from benchmarks.simulated_day import HOURS, Fleet, Hour, rate_at, simulate
from ranking.errors import InputError
from ranking.files import write_json
from ranking.program import run

_RESULTS = Path(__file__).parents[1] / "docs" / "results"


@dataclass
class Config:
    """Plan the machines of an online service.

    Args:
        requests_per_second: pages a second at the daily peak
        candidates: documents of a page
        tokens: tokens of a (query, document) pair, on average
        deadline_ms: 99 of 100 pages must be ranked by then at the peak
        cores: of a student machine
        encoder_tokens_per_second: what a student machine's accelerator encodes; without it the cores encode
        call_ms: fixed time of one encoder call
        merged_lists: lists that one call may take (packed students: 4)
        spare: student machines that may be gone at the peak without a missed deadline
        price_per_hour: of a student machine
        router_price_per_hour: of a router process with its core and disk
        disk_mb_per_second: what a router's log disk writes for good
        busy_share: how busy a router and its disk may be at the peak
        lowest_share: traffic at the quietest hour, as a share of the peak's
        failure_hours: mean hours between two failures of a student machine
        repair_minutes: until a failed machine serves again
        tokenise_ms_per_list: processor milliseconds of one core to tokenise a page, instead of the measured ones
        encode_ms_per_list: the same, to encode it on the cores
        router_ms: the same, of the router
        log_bytes_per_page: of an exposure's line, instead of the measured one
        results: folder with the measured rates
        simulated_pages: pages of each simulated hour; 0 leaves the simulation out
        seed: of the simulation
        out: JSON file for the plan
    """

    requests_per_second: float
    candidates: int
    tokens: int
    deadline_ms: float = 150.0
    cores: int = 16
    encoder_tokens_per_second: float | None = None
    call_ms: float = 0.0
    merged_lists: int = 1
    spare: int = 1
    price_per_hour: float = 0.0
    router_price_per_hour: float = 0.0
    disk_mb_per_second: float = 100.0
    busy_share: float = 0.6
    lowest_share: float = 0.2
    failure_hours: float = 2000.0
    repair_minutes: float = 10.0
    tokenise_ms_per_list: float | None = None
    encode_ms_per_list: float | None = None
    router_ms: float | None = None
    log_bytes_per_page: float | None = None
    results: Path = _RESULTS
    simulated_pages: int = 20_000
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in (
            "requests_per_second", "candidates", "tokens", "deadline_ms", "cores", "merged_lists", "disk_mb_per_second",
            "failure_hours", "repair_minutes", "encoder_tokens_per_second", "tokenise_ms_per_list",
            "encode_ms_per_list", "router_ms", "log_bytes_per_page",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}: a number above 0 is needed")
        for name in ("call_ms", "spare", "price_per_hour", "router_price_per_hour", "simulated_pages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")
        for name in ("busy_share", "lowest_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share above 0 and at most 1 is needed")


@dataclass(frozen=True)
class Plan:
    """The closed-form answer. stages: pages a second of each stage of the fleet, and how busy it is at the peak.

    machines include the spare ones. machine_hours: of students in a day, if as many run as each hour needs.
    """

    students: int
    routers: int
    stages: dict[str, tuple[float, float]]
    p99_ms: float
    idle_ms: float
    machine_hours: int
    terabytes_a_day: float

    @property
    def saturates_first(self) -> str:
        """The stage that the peak keeps busiest."""
        return max(self.stages, key=lambda name: self.stages[name][1])


def main(config: Config) -> None:
    """Print the plan, the simulated day and where the rates come from."""
    rates = rates_of(config)
    plan = make_plan(config, rates)
    lines = describe(config, rates, plan)
    hours: list[Hour] = []
    if config.simulated_pages:
        hours = simulated(config, rates, plan.students)
        lines += describe_day(config, rates, plan, hours)
    print("\n".join(lines))
    if config.out:
        found = dataclasses.asdict(plan) | {"saturates_first": plan.saturates_first, "sources": rates.sources}
        write_json(config.out, found | {"hours": [dataclasses.asdict(hour) for hour in hours]})


def rates_of(config: Config) -> Rates:
    """The measured rates, and what flags say instead."""
    list_tokens = config.candidates * config.tokens
    given = {
        "tokenising": ("tokenise_ms", config.tokenise_ms_per_list, list_tokens),
        "encoder": ("encode_ms", config.encode_ms_per_list, list_tokens),
        "router": ("router_ms", config.router_ms, 1),
        "log": ("log_bytes", config.log_bytes_per_page, config.candidates),
    }
    if all(value is not None for _, value, _ in given.values()):
        rates = Rates(0, 0, 0, 0, {})
    else:
        rates = Rates.measured(config.results)
    changed = {name: value / per for name, value, per in given.values() if value is not None}
    sources = rates.sources | {figure: "flag" for figure, (_, value, _) in given.items() if value is not None}
    if config.encoder_tokens_per_second is not None:
        sources["encoder"] = "flag"
    return dataclasses.replace(rates, **changed, sources=sources)


def machine_of(config: Config) -> StudentMachine:
    """The student machine that the flags describe."""
    return StudentMachine(config.cores, config.encoder_tokens_per_second, config.call_ms, config.merged_lists)


def make_plan(config: Config, rates: Rates) -> Plan:
    """The smallest fleet whose pages meet the deadline at the peak with the spare machines gone. InputError if none."""
    load = Load(config.requests_per_second, config.candidates, config.tokens)
    machine, router = machine_of(config), Router(config.disk_mb_per_second)
    stages = machine.stages(load, rates)
    service, idle = 1 / min(stages.values()), machine.idle_seconds(load, rates)
    if idle >= config.deadline_ms / 1e3:
        raise InputError(
            f"one page takes {idle * 1e3:.0f} ms on an idle machine, and the deadline is {config.deadline_ms:g} ms: "
            "more machines do not help; fewer candidates, fewer tokens, more cores or an accelerator do"
        )

    def needed(rate: float) -> int:
        return smallest(lambda count: p99(count, rate, service, idle, config) <= config.deadline_ms / 1e3)

    students = needed(load.requests_per_second) + config.spare
    router_stages = router.stages(load, rates)
    routers = math.ceil(load.requests_per_second / (min(router_stages.values()) * config.busy_share))
    fleet = {name: rate * students for name, rate in stages.items()}
    fleet |= {name: rate * routers for name, rate in router_stages.items()}
    by_hour = [rate_at(hour + 0.5, load.requests_per_second, config.lowest_share) for hour in range(HOURS)]
    return Plan(
        students=students,
        routers=routers,
        stages={name: (rate, load.requests_per_second / rate) for name, rate in fleet.items()},
        p99_ms=p99(students, load.requests_per_second, service, idle, config) * 1e3,
        idle_ms=idle * 1e3,
        machine_hours=sum(needed(rate) + config.spare for rate in by_hour),
        terabytes_a_day=sum(by_hour) * 3600 * rates.log_bytes * config.candidates / 1e12,
    )


def p99(count: int, rate: float, service: float, idle: float, config: Config) -> float:
    """Seconds within which 99 of 100 pages are ranked.

    Where calls take several lists, pages that wait are served together: their call takes all their time, and the wait
    is at most that of whole calls. Both are upper bounds; with one list a call the figure is the queue's own.
    """
    found = waiting(count, rate, service)
    together = (config.merged_lists - 1) * service if found.share > 0.01 else 0.0
    return idle + together + config.merged_lists * found.at(0.99)


def simulated(config: Config, rates: Rates, students: int) -> list[Hour]:
    """The day of this many students."""
    load = Load(config.requests_per_second, config.candidates, config.tokens)
    machine = machine_of(config)
    service = 1 / min(machine.stages(load, rates).values())
    call = config.call_ms / 1e3 if config.encoder_tokens_per_second is not None else 0.0
    fleet = Fleet(
        machines=students,
        call_seconds=call,
        list_seconds=service - call / config.merged_lists,
        merged_lists=config.merged_lists,
        idle_seconds=machine.idle_seconds(load, rates),
        failure_hours=config.failure_hours,
        repair_seconds=config.repair_minutes * 60,
    )
    return simulate(
        fleet,
        config.requests_per_second,
        config.lowest_share,
        config.deadline_ms / 1e3,
        config.simulated_pages,
        config.seed,
    )


def describe(config: Config, rates: Rates, plan: Plan) -> list[str]:
    """The plan in words and a table of its stages."""
    fixed = plan.students * HOURS
    routers = plan.routers * HOURS * config.router_price_per_hour
    lines = [
        f"peak {config.requests_per_second:g} pages/s of {config.candidates} candidates x {config.tokens} tokens: "
        f"{plan.students} student machines ({config.spare} spare), {plan.routers} router processes",
        f"a page takes {plan.idle_ms:.1f} ms on an idle machine, p99 {plan.p99_ms:.1f} ms at the peak "
        f"(deadline {config.deadline_ms:g} ms)",
        "",
        f"{'stage of the fleet':45} {'pages/s':>10} {'busy at the peak':>17}",
    ]
    lines += [f"{name:45} {rate:10.0f} {busy:16.0%}" for name, (rate, busy) in plan.stages.items()]
    lines += [
        f"first to saturate: {plan.saturates_first}",
        "",
        f"log: {plan.terabytes_a_day:.2f} TB a day before compaction",
        f"students: {fixed} machine hours a day, {plan.machine_hours} if their number follows the hours",
    ]
    if config.price_per_hour or config.router_price_per_hour:
        whole = fixed * config.price_per_hour + routers
        following = plan.machine_hours * config.price_per_hour + routers
        lines.append(f"money: {whole:,.2f} a day, {following:,.2f} if students follow the hours")
    lines += ["", "rates:"] + [f"  {name}: {source}" for name, source in sorted(rates.sources.items())]
    return lines


def describe_day(config: Config, rates: Rates, plan: Plan, hours: list[Hour]) -> list[str]:
    """The simulated hours beside the closed form's p99."""
    load = Load(config.requests_per_second, config.candidates, config.tokens)
    machine = machine_of(config)
    service, idle = 1 / min(machine.stages(load, rates).values()), machine.idle_seconds(load, rates)
    pages = sum(hour.requests_per_second for hour in hours)
    late = sum(hour.requests_per_second * hour.late for hour in hours) / pages
    lines = [
        "",
        f"{'hour':>4} {'pages/s':>9} {'up':>6} {'busy':>5} {'p50 ms':>8} {'p99 ms':>8} {'closed p99':>10} {'late':>7}",
    ]
    for hour in hours:
        closed = p99(plan.students, hour.requests_per_second, service, idle, config) * 1e3
        lines.append(
            f"{hour.hour:>4} {hour.requests_per_second:9.0f} {hour.machines_up:6.1f} {hour.busy:5.0%} "
            f"{hour.p50 * 1e3:8.1f} {hour.p99 * 1e3:8.1f} {closed:10.1f} {hour.late:7.2%}"
        )
    lines.append(f"late over the day: {late:.3%} of the pages; the router ranks those with its fallback")
    return lines


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.plan --requests-per-second 500 --candidates 48 --tokens 96")
