"""Guardrails and breakers: when they act, what they leave alone, what survives a restart."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
from dataclasses import asdict

import pytest

from clients.ab.experiment.file import parse
from clients.ab.router.breaker import Breaker
from clients.ab.router.guarded_scorer import GuardedScorer
from clients.ab.router.guardrails import GuardrailWatch, Ramp, covering_value
from ranking.errors import InputError

EXPERIMENT = """
default_model: baseline
experiments:
  - name: exp
    coverage: 0.8
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
    guardrails: {max_error_share: 0.1, max_p99_ms: 100, window_seconds: 10, min_pages: 50, min_coverage: 0.15}
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watch(tmp_path, text: str = EXPERIMENT):
    experiments = parse(text, "x").experiments
    clock = Clock()
    guard = GuardrailWatch(tmp_path, clock)
    guard.adopt(experiments)
    return guard, experiments, clock


def serve(guard, experiment, pages: int, arm: str = "student", ms: float = 10, failed: int = 0, user: str = ""):
    """A page each of so many users, or all of one user."""
    for i in range(pages):
        guard.observe(experiment, arm, user or f"user {next(USERS)}", ms / 1000, i < failed)


USERS = itertools.count()


def test_failures_halve_the_coverage_until_it_is_zero(tmp_path):
    guard, experiments, _ = watch(tmp_path)
    seen = []
    for _ in range(4):
        serve(guard, experiments[0], 60, failed=20)
        seen += [(r.before, r.after) for r in guard.judge(experiments)]
    assert seen == [(0.8, 0.4), (0.4, 0.2), (0.2, 0.0), (0.0, 0.0)]
    assert guard.splits["exp"].coverage == 0.0


def test_a_slow_arm_is_ramped_down_with_the_reason(tmp_path):
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], 95)
    serve(guard, experiments[0], 5, ms=300)
    (ramp,) = guard.judge(experiments)
    assert ramp.reason == "p99 of 99 pages is 300 ms, 100 ms are allowed"  # but for one user's
    assert ramp.arm == "student"


@pytest.mark.parametrize(
    "pages",
    [
        {"pages": 50, "failed": 50},  # too few without one user's
        {"pages": 101, "failed": 11},  # exactly the limit, without one that failed
        {"pages": 500, "failed": 500, "arm": "baseline"},  # the control is not judged
        {"pages": 200, "ms": 100},
    ],
)
def test_what_is_within_limits_is_left_alone(tmp_path, pages):
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], **pages)
    assert guard.judge(experiments) == [] and not guard.splits


@pytest.mark.parametrize("met", [{"failed": 5000}, {"ms": 5000}])
def test_one_users_pages_ramp_nothing_down(tmp_path, met):
    """Seen: one user's pages of 1000 documents, which no model scores in time, cut the experiment for everybody."""
    guard, experiments, clock = watch(tmp_path)
    serve(guard, experiments[0], 5000, user="with large pages", **met)
    assert guard.judge(experiments) == []  # alone ...
    serve(guard, experiments[0], 60)
    assert guard.judge(experiments) == []  # ... or among others
    serve(guard, experiments[0], 5000, user="with small pages")
    serve(guard, experiments[0], 1, **met)
    assert guard.judge(experiments) == []  # two users of 62 with a page each are no arm that fails, nor 2 of 5061 pages
    for _ in range(3):
        clock.now += 4
        serve(guard, experiments[0], 60, **met)
    assert len(guard.judge(experiments)) == 1  # all users alike: that is the arm


@pytest.mark.parametrize(("met", "reason"), [({"failed": 101}, "fell back"), ({"ms": 300}, "took over 100 ms")])
def test_a_heavy_user_does_not_hide_that_an_arm_fails_for_the_others(tmp_path, met, reason):
    """Seen: one bot with 900 good pages hid that each of 101 users met failures."""
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], 20_000, user="with small pages")
    serve(guard, experiments[0], 101, **met)
    (ramp,) = guard.judge(experiments)
    assert ramp.reason.startswith("of 101 users' pages 99.0% ") and reason in ramp.reason


def test_many_users_with_a_page_each_do_not_hide_that_an_arm_fails_for_the_others(tmp_path):
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], 1000)
    for number in range(101):
        serve(guard, experiments[0], 50, failed=50, user=f"regular {number}")
    (ramp,) = guard.judge(experiments)
    assert ramp.reason == "83.3% of 6000 pages fell back, 10.0% are allowed"


def test_a_heavy_bad_user_does_not_hide_it_either(tmp_path):
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], 30, user="patient", failed=30)
    serve(guard, experiments[0], 100, failed=50)
    (ramp,) = guard.judge(experiments)
    assert ramp.reason == "50.0% of 100 pages fell back, 10.0% are allowed"


def test_the_window_forgets_users_with_their_pages(tmp_path):
    guard, experiments, clock = watch(tmp_path)
    for _ in range(20):
        clock.now += 4
        serve(guard, experiments[0], 300, failed=20)
        serve(guard, experiments[0], 3, ms=300)
        assert guard.judge(experiments) == []
    (window,) = guard._windows.values()
    assert len(window._pages) == len(window._of_user) == 3 * 303
    assert window._fell_back.total() == 60 and window._slow.total() == 9
    clock.now += 60
    assert guard.judge(experiments) == [] and not (window._pages or window._of_user or window._fell_back)


def test_pages_outside_the_window_do_not_count(tmp_path):
    guard, experiments, clock = watch(tmp_path)
    serve(guard, experiments[0], 100, failed=100)
    clock.now += 11
    serve(guard, experiments[0], 60)
    assert guard.judge(experiments) == []


def test_one_breach_is_judged_once(tmp_path):
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], 100, failed=100)
    assert len(guard.judge(experiments)) == 1
    assert guard.judge(experiments) == []


def test_a_ramp_down_outlives_a_restart_and_ends_with_an_edit(tmp_path):
    guard, experiments, _ = watch(tmp_path)
    serve(guard, experiments[0], 100, failed=100)
    guard.judge(experiments)
    again, _, _ = watch(tmp_path)
    assert again.splits["exp"].coverage == 0.4
    edited, _, _ = watch(tmp_path, EXPERIMENT.replace("coverage: 0.8", "coverage: 0.7"))
    assert not edited.splits and not edited.ramps


def test_a_file_that_lacked_the_experiment_for_a_moment_does_not_restore_full_traffic(tmp_path):
    """Seen: a reload that met a half-written file dropped the ramp-down, and the whole file brought full coverage."""
    now = [1e9]
    guard, (experiment,), _ = watch(tmp_path)
    guard._calendar = lambda: now[0]
    serve(guard, experiment, 100, failed=100)
    guard.judge((experiment,))
    guard.adopt(())
    assert not guard.splits
    guard.adopt((experiment,))
    assert guard.splits["exp"].coverage == 0.4 and guard.ramps["exp"].after == 0.4
    guard.adopt(())
    again = GuardrailWatch(tmp_path, calendar=lambda: now[0])  # a restart in between changes nothing
    again.adopt((experiment,))
    assert again.splits["exp"].coverage == 0.4
    again.adopt(())
    now[0] += 8 * 86_400
    again.adopt((experiment,))  # a definition that comes back after a week starts afresh ...
    again.adopt(())
    again.adopt((experiment,))
    assert again.splits["exp"].coverage == 0.4  # ... only if it was really out of force meanwhile
    again.adopt(())
    now[0] += 8 * 86_400
    again.adopt(())
    again.adopt((experiment,))
    assert not again.splits


TWO = EXPERIMENT.replace("- name: exp", "- name: exp\n    seed: one") + EXPERIMENT.partition("experiments:\n")[
    2
].replace("- name: exp", "- name: other\n    seed: two")


def ramp_down(guard, experiments, number: int, times: int = 1) -> None:
    for _ in range(times):
        serve(guard, experiments[number], 100, failed=100)
        assert len(guard.judge(experiments)) == 1


def test_routers_on_one_folder_keep_each_others_ramp_downs(tmp_path):
    """Seen: each wrote its own ones only, so that after a restart an experiment had its full coverage again."""
    first, experiments, _ = watch(tmp_path, TWO)
    second, _, _ = watch(tmp_path, TWO)
    ramp_down(first, experiments, 0)
    ramp_down(second, experiments, 1)
    again, _, _ = watch(tmp_path, TWO)
    assert {name: split.coverage for name, split in again.splits.items()} == {"exp": 0.4, "other": 0.4}
    serve(first, experiments[0], 100)
    serve(first, experiments[1], 100, failed=100)
    assert first.judge(experiments) == []  # taken over; one decision does not fall twice on the same pages
    assert {name: split.coverage for name, split in first.splits.items()} == {"exp": 0.4, "other": 0.4}
    ramp_down(first, experiments, 1)
    ramp_down(second, experiments, 0)
    again, _, _ = watch(tmp_path, TWO)  # of one experiment the lower coverage is kept, whoever wrote last
    assert {name: split.coverage for name, split in again.splits.items()} == {"exp": 0.2, "other": 0.2}


def test_what_is_in_force_at_one_router_for_weeks_is_not_forgotten_by_another(tmp_path):
    now = [1e9]
    experiments = parse(TWO, "x").experiments
    first, second = (GuardrailWatch(tmp_path, Clock(), lambda: now[0]) for _ in range(2))
    first.adopt(experiments)
    second.adopt(experiments[1:])
    ramp_down(first, experiments, 0)
    for _ in range(10):
        now[0] += 86_401
        assert first.judge(experiments) == []
    ramp_down(second, experiments[1:], 0)
    again, _, _ = watch(tmp_path, TWO)
    assert {name: split.coverage for name, split in again.splits.items()} == {"exp": 0.4, "other": 0.4}


@pytest.mark.parametrize("hindrance", ["lock", "unreadable"])
def test_a_ramp_down_that_could_not_be_written_is_told_once_and_written_later(tmp_path, caplog, hindrance):
    guard, experiments, _ = watch(tmp_path)
    lock, state = tmp_path / ".ramp.lock", tmp_path / "ramp.json"
    with lock.open("w") as held:
        if hindrance == "lock":
            fcntl.flock(held, fcntl.LOCK_EX)
        else:
            state.write_text("{half")  # of another router: replacing it could restore full traffic
        ramp_down(guard, experiments, 0)
        guard.judge(experiments)
    assert (not state.exists()) if hindrance == "lock" else state.read_text() == "{half"
    told = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(told) == 1 and {"lock": "another router holds", "unreadable": "cannot be read"}[hindrance] in told[0]
    assert guard.splits["exp"].coverage == 0.4
    if hindrance == "unreadable":
        state.unlink()
    guard.judge(experiments)
    assert [ramp["after"] for ramp in json.loads(state.read_text()).values()] == [0.4]


@pytest.mark.parametrize(
    "state", ['{"exp": {"half": ', {"after": "0.4"}, {"after": 4.0}, {"in_force": None}, {"fingerprint": []}]
)
def test_an_unreadable_state_stops_the_start_rather_than_restoring_full_traffic(tmp_path, state):
    ramp = asdict(Ramp("exp", "student", "slow", 0.8, 0.4, "f"))
    (tmp_path / "ramp.json").write_text(state if isinstance(state, str) else json.dumps({"f": ramp | state}))
    with pytest.raises(InputError, match=r"ramp\.json: cannot be read"):
        watch(tmp_path)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_the_covering_value_is_the_smallest_value_that_covers_the_share(share, expected):
    assert covering_value([float(i) for i in range(100, 0, -1)], share) == expected


def report(breaker: Breaker, *outcomes: bool, user: str = "", probe: bool = False) -> None:
    """Outcomes of so many users, or all of one user."""
    for succeeded in outcomes:
        breaker.report(user or f"user {next(USERS)}", succeeded, probe)


def test_a_breaker_opens_after_enough_failures_and_not_before():
    breaker = Breaker(window=10, failures=5, cooldown_seconds=2, clock=Clock())
    report(breaker, *[False, True] * 4)
    assert not breaker.is_open and breaker.admits("u")
    report(breaker, False)
    assert breaker.is_open and not breaker.admits("u")


def test_an_open_breaker_lets_one_probe_through_at_a_time():
    clock = Clock()
    breaker = Breaker(window=4, failures=2, cooldown_seconds=2, clock=clock)
    report(breaker, False, False)
    clock.now += 1.9
    assert not breaker.admits("a")
    clock.now += 0.2
    assert breaker.admits("") and not breaker.admits("b")  # callers who name no user are one: nobody's turn comes first
    breaker.withdraw(probe=True)
    assert breaker.admits("a") and not breaker.admits("b")
    breaker.report("a", False, probe=True)
    assert not breaker.admits("b")
    clock.now += 2.1
    assert breaker.admits("b")
    breaker.report("b", True, probe=True)
    assert not breaker.is_open and breaker.admits("a") and breaker.admits("b")


def test_stragglers_of_the_time_before_do_not_close_an_open_breaker():
    """Seen: where a call may take longer than the cooldown, an old one's end was taken for the probe's."""
    clock = Clock()
    breaker = Breaker(window=4, failures=2, cooldown_seconds=2, clock=clock)
    report(breaker, False, False, True, True)
    assert breaker.is_open
    clock.now += 2.1
    assert breaker.admits("a")
    report(breaker, True, False)
    breaker.withdraw()
    assert breaker.is_open and not breaker.admits("b")
    breaker.report("a", True, probe=True)
    assert not breaker.is_open


def test_an_open_breaker_that_nobody_meets_any_more_closes():
    """Seen: once the arm of a failed model was killed, its breaker stayed open, and `BreakerOpen` fired, for ever."""
    clock = Clock()
    breaker = Breaker(window=4, failures=2, cooldown_seconds=2, clock=clock)
    report(breaker, False, False)
    clock.now += 61
    assert breaker.is_open
    clock.now += 1.1
    assert not breaker.is_open and breaker.admits("a") and breaker.admits("b")
    report(breaker, False)
    assert not breaker.is_open


def test_a_cancelled_call_is_no_failure_of_the_model():
    class Hanging:
        renewals = 0

        async def score(self, model, page, deadline_ms):
            await asyncio.sleep(30)

    async def ask() -> None:
        scorer = GuardedScorer(Hanging(), lambda: breaker, lambda model, seconds, failure: told.append(failure))
        for user in "abc":
            task = asyncio.create_task(scorer.score("m", None, 1000.0, user))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    breaker, told = Breaker(window=4, failures=2, cooldown_seconds=2, clock=Clock()), []
    asyncio.run(ask())
    assert not breaker.is_open and told == ["cancelled"] * 3


def test_old_failures_leave_the_window():
    breaker = Breaker(window=4, failures=2, cooldown_seconds=2, clock=Clock())
    report(breaker, False, True, True, True, True, False)
    assert not breaker.is_open


def test_one_user_opens_no_breaker_hides_no_failure_and_keeps_none_open():
    """Seen: ten pages of 1000 documents of one user took the model from everybody, for as long as more of them came."""
    clock = Clock()
    breaker = Breaker(window=20, failures=10, cooldown_seconds=2, clock=clock)
    report(breaker, *[False] * 100, user="with large pages")
    assert not breaker.is_open
    report(breaker, *[False] * 9)
    report(breaker, *[True] * 100, user="with small pages")
    assert breaker.is_open  # 4 of the one user, 6 of others: the model fails for them as well
    clock.now += 2
    assert breaker.admits("with large pages")
    breaker.report("with large pages", False, probe=True)
    clock.now += 2
    assert not breaker.admits("with large pages") and breaker.admits("another")
    breaker.withdraw(probe=True)
    clock.now += 2
    assert breaker.admits("with large pages")  # where nobody else comes
    breaker.report("with large pages", True, probe=True)
    assert not breaker.is_open


def test_where_nobody_has_a_success_the_model_is_left_alone_whoever_asks():
    """Seen: with one name for all users an outage was never noticed, and each page waited for its whole deadline."""
    clock = Clock()
    breaker = Breaker(window=20, failures=10, cooldown_seconds=2, clock=clock)
    for _ in range(49):
        clock.now += 0.2
        report(breaker, False, user="anonymous")
    report(breaker, True, *[False] * 19, user="anonymous")
    for _ in range(49):
        clock.now += 0.2
        report(breaker, False, user="anonymous")
        assert not breaker.is_open
    clock.now += 0.3
    report(breaker, False, user="anonymous")
    assert breaker.is_open
    clock.now += 5
    assert breaker.admits("anonymous")
    report(breaker, True, user="anonymous", probe=True)
    report(breaker, *[False] * 40, user="anonymous")
    assert not breaker.is_open


def test_what_failed_long_ago_opens_no_breaker():
    """Seen: failures of six users a day before stayed in the window, since a user's calls push only their own out."""
    clock = Clock()
    breaker = Breaker(window=20, failures=10, cooldown_seconds=2, clock=clock)
    report(breaker, *[False] * 9)
    for _ in range(100):
        clock.now += 1
        report(breaker, True, user="one")
    report(breaker, *[False] * 4)
    assert not breaker.is_open
