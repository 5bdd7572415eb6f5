"""Off-policy forecasts: known cases of the estimators, the router's own tables, a bandit log, refusals in one line."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.ab.forecast.estimators import Limits, LoggedRows, forecast
from clients.ab.forecast.router_pages import PositionBias
from clients.ab_forecast import EXIT_REFUSED, Config, main
from ranking.errors import DataError, InputError
from ranking.schema import TABLES, write_table

LOOKED_AT = [1.0, 0.6, 0.3]
RELEVANCE = {"a": 0.8, "b": 0.4, "c": 0.1}


def bandit(items: np.ndarray, logging: np.ndarray, target: np.ndarray, rates: np.ndarray, seed: int) -> LoggedRows:
    """Draws of `logging`; each is a page and a user."""
    clicks = np.random.default_rng(seed).random(len(items)) < rates[items]
    n, one = len(items), np.ones(len(items))
    weight = target[items] / logging[items]
    return LoggedRows(
        np.arange(n), clicks.astype(float), weight, one, rates[items], np.arange(n), one, np.full(n, target @ rates)
    )


def test_a_policy_forecasts_itself():
    policy = np.array([0.5, 0.3, 0.2])
    items = np.random.default_rng(0).choice(3, 5000, p=policy)
    outlook = forecast(bandit(items, policy, policy, np.array([0.2, 0.1, 0.4]), 1), Limits())
    for one in outlook.forecasts:
        assert one.value == pytest.approx(outlook.logged, rel=0.02)
        assert one.lift == pytest.approx(0, abs=0.02)
    assert outlook.of("IPS").value == outlook.logged and outlook.of("IPS").lift_low == outlook.of("IPS").lift_high == 0
    assert outlook.overlap.effective_rows == pytest.approx(5000) and not outlook.overlap.unsupported


@pytest.mark.parametrize("estimator", ["IPS", "SNIPS", "DR"])
def test_intervals_hold_the_truth_of_another_policy_about_as_often_as_they_say(estimator):
    logging, target = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6])
    rates = np.array([0.05, 0.1, 0.15])
    rng = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        items = rng.choice(3, 3000, p=logging)
        one = forecast(bandit(items, logging, target, rates, seed), Limits()).of(estimator)
        held += one.low <= target @ rates <= one.high
    assert 0.90 <= held / 200 <= 0.99


def test_a_right_reward_model_narrows_the_interval():
    logging, target = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6])
    rates = np.array([0.9, 0.1, 0.5])
    items = np.random.default_rng(3).choice(3, 3000, p=logging)
    outlook = forecast(bandit(items, logging, target, rates, 0), Limits())
    widths = {one.estimator: one.high - one.low for one in outlook.forecasts}
    assert widths["DR"] < widths["SNIPS"] < widths["IPS"]


def test_wrong_probabilities_and_poor_overlap_are_refused():
    logging, rates = np.array([0.989, 0.01, 0.001]), np.array([0.3, 0.3, 0.3])
    items = np.random.default_rng(4).choice(3, 5000, p=logging)
    poor = forecast(bandit(items, logging, np.array([0.0, 0.0, 1.0]), np.ones(3), 0), Limits(min_effective_clicks=1))
    assert "the two show too little in common" in poor.refusal and not poor.forecasts
    wrong = forecast(bandit(items, logging * 2, logging, rates, 0), Limits())
    assert "the logged probabilities are wrong" in wrong.refusal and "0.50" in wrong.refusal
    with pytest.raises(ValueError, match="at least two"):
        forecast(bandit(items[:1], logging, logging, rates, 0), Limits())


def ab_data(folder: Path, pages: int, order: str, other: str, looked_at=LOOKED_AT, experiment="exp") -> Path:
    """exposures and shadows as compaction writes them: pages in one order, which `student` would put in the other."""
    rng = np.random.default_rng(7)
    noon = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC)
    exposures, shadows = [], []
    for number in range(pages):
        chances = np.array([RELEVANCE.get(doc, 0.0) for doc in order]) * (looked_at + [0.0] * len(order))[: len(order)]
        positions = [place + 1 for place, click in enumerate(rng.random(len(order)) < chances) if click]
        shared = {"request_id": f"r{number}", "timestamp": noon, "experiment": experiment, "arm": "baseline"}
        exposures.append(
            shared
            | {
                "user_id": f"u{number // 2}", "served_by": "baseline", "fallback": "", "model_version": "1",
                "latency_ms": 5.0, "query": "q", "query_length": 1, "platform": "", "segments": "{}",
                "forced": number % 10 == 9, "documents": list(order), "scores": [0.0] * len(order), "teams": [],
                "clicks": len(positions), "clicked_positions": positions, "dwell_seconds": 0.0, "config": "c",
            }
        )  # fmt: skip
        scores = [float(-other.index(doc)) for doc in order]
        shadows.append(
            shared
            | {
                "model": "student", "failure": "" if number % 5 else "timeout", "latency_ms": 5.0,
                "documents": list(order), "scores": scores if number % 5 else [],
            }
        )  # fmt: skip
    for name, rows in (("exposures", exposures), ("shadows", shadows)):
        (folder / name).mkdir(parents=True)
        write_table(folder / name / "2026-01-05.parquet", name, pa.Table.from_pylist(rows, TABLES[name].schema))
    return folder


def report(folder: Path, looked_at=LOOKED_AT) -> Path:
    path = folder / "clicks.report.json"
    propensities = {str(k): p for k, p in enumerate(looked_at, 1)}
    bias = {"propensities": propensities, "standard_errors_of_log": dict.fromkeys(propensities, 0.0)}
    path.write_text(json.dumps({"position_bias": bias}))
    return path


def test_the_routers_log_forecasts_an_order_that_was_never_shown(tmp_path, capsys):
    data = ab_data(tmp_path / "data", 6000, "cba", "abc")
    out = tmp_path / "forecast.json"
    assert main(Config(data=data, model="student", propensities=report(tmp_path), out=out)) == 0
    found = json.loads(out.read_text())
    assert found["pages"] == 4200  # of ten pages two had no shadow, and one of the others was forced
    truth = sum(p * RELEVANCE[doc] for p, doc in zip(LOOKED_AT, "abc"))
    shown = sum(p * RELEVANCE[doc] for p, doc in zip(LOOKED_AT, "cba"))
    for one in found["forecasts"]:
        assert one["low"] < truth < one["high"] and one["lift_low"] < truth / shown - 1 < one["lift_high"]
        assert one["value"] == pytest.approx(truth, rel=0.1)
        # a page's documents are the same in both orders: no estimator knows more than another (docs/ab-forecast.md)
        assert one["value"] == pytest.approx(found["forecasts"][0]["value"], rel=1e-9)
    assert "IPS" in (told := capsys.readouterr().out) and "intervals of 95%" in told


def test_scores_of_ones_own_stand_in_for_shadows(tmp_path):
    data = ab_data(tmp_path / "data", 2000, "cba", "abc")
    rows = [{"request_id": f"r{n}", "doc_id": doc, "score": -ord(doc)} for n in range(2000) for doc in "abc"]
    pq.write_table(pa.Table.from_pylist(rows[:-1]), tmp_path / "scores.parquet")
    config = Config(
        data=data, scores=tmp_path / "scores.parquet", propensities=report(tmp_path), out=tmp_path / "f.json"
    )
    assert main(config) == 0
    # every tenth page was forced, the last one among them; a page lacking a score would be left out
    assert json.loads((tmp_path / "f.json").read_text())["pages"] == 1800


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows + rows[:1], "document 'a' of page 0 is there twice"),
        (lambda rows: [row | {"score": str(row["score"])} for row in rows], "score is string: numbers are needed"),
        (lambda rows: [*rows[:-1], rows[-1] | {"score": math.nan}], "document 'c' of page 19 has a score that is NaN"),
    ],
)
def test_scores_that_would_give_a_wrong_forecast_are_refused(tmp_path, change, reason):
    """Seen: each gave figures and exit 0; a document twice made a lift of -6% one of -38%."""
    data = ab_data(tmp_path / "data", 20, "cba", "abc")
    rows = [{"request_id": n, "doc_id": doc, "score": -float(ord(doc))} for n in range(20) for doc in "abc"]
    pq.write_table(pa.Table.from_pylist(change(rows)), tmp_path / "scores.parquet")
    with pytest.raises(DataError, match=reason):
        main(Config(data=data, scores=tmp_path / "scores.parquet", propensities=report(tmp_path)))


@pytest.mark.parametrize("propensities", [{}, {"0": 1.0}, {"1": 1.0, "3": 0.5}, {"1": math.nan}, {"1": -0.5}, []])
def test_propensities_that_are_none_are_refused(tmp_path, propensities):
    bias = {"propensities": propensities, "standard_errors_of_log": {}}
    (tmp_path / "r.json").write_text(json.dumps({"position_bias": bias}))
    with pytest.raises(InputError, match="no position bias there"):
        PositionBias.read(tmp_path / "r.json")


def test_an_order_of_documents_that_nobody_saw_is_refused_in_one_line(tmp_path, capsys):
    data = ab_data(tmp_path / "data", 6000, "abcxyz", "xyzabc")
    assert main(Config(data=data, model="student", propensities=report(tmp_path))) == EXIT_REFUSED
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("no forecast: ") and "and 10 are needed" in last


def test_what_is_missing_is_named(tmp_path):
    data = ab_data(tmp_path / "data", 20, "cba", "abc")
    with pytest.raises(InputError, match="no page of experiment = 'other' was scored by student"):
        main(Config(data=data, model="student", experiment="other", propensities=report(tmp_path)))
    with pytest.raises(InputError, match=r"no shadows there; give the experiment a `shadow` share"):
        (tmp_path / "alone").mkdir()
        (data / "exposures").rename(tmp_path / "alone/exposures")
        main(Config(data=tmp_path / "alone", model="student", propensities=report(tmp_path)))
    with pytest.raises(InputError, match="no position bias there"):
        PositionBias.read(tmp_path / "nowhere.json")
    for wrong in ({}, {"data": data}, {"data": data, "propensities": report(tmp_path)}, {"bandit_log": data}):
        with pytest.raises(ValueError, match=r"give either|is needed|belong together"):
            Config(**wrong)


def test_a_log_that_cannot_be_read_is_one_line(tmp_path):
    data = ab_data(tmp_path / "data", 20, "cba", "abc")
    (data / "exposures/2026-01-05.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"data: DuckDB: .*2026-01-05\.parquet"):
        main(Config(data=data, model="student", propensities=report(tmp_path)))


def test_a_bandit_log_is_read_with_its_row_where_it_is_wrong(tmp_path, capsys):
    rng = np.random.default_rng(0)
    paths = {}
    for name, policy in (("random", np.full(4, 0.25)), ("greedy", np.array([0.7, 0.1, 0.1, 0.1]))):
        items = rng.choice(4, 4000, p=policy)
        clicks = rng.random(4000) < np.array([0.2, 0.1, 0.05, 0.05])[items]
        lines = [f"{i},t,{item},{1 + i % 3},{int(c)},{policy[item]}" for i, (item, c) in enumerate(zip(items, clicks))]
        paths[name] = tmp_path / f"{name}.csv.gz"
        with gzip.open(paths[name], "wt") as stream:
            stream.write("\n".join([",timestamp,item_id,position,click,propensity_score", *lines]) + "\n")
    out = tmp_path / "f.json"
    assert main(Config(bandit_log=paths["random"], bandit_target=paths["greedy"], out=out)) == 0
    found = json.loads(out.read_text())
    truth = 0.7 * 0.2 + 0.1 * 0.1 + 0.1 * 0.05 * 2
    assert all(one["low"] < truth < one["high"] for one in found["forecasts"])
    broken = tmp_path / "broken.csv"
    broken.write_text("item_id,position,click,propensity_score\n1,1,0,0.5\n2,1,0,0\n")
    with pytest.raises(DataError, match=r"propensity_score is missing or outside its range") as caught:
        main(Config(bandit_log=broken, bandit_target=paths["greedy"]))
    assert caught.value.row == 2
    broken.write_text("item_id,position,click,propensity_score\n1,1,0,0.5\n2,1,nan,0.5\n")
    with pytest.raises(DataError, match=r"row 2: click is missing or outside its range"):
        main(Config(bandit_log=broken, bandit_target=paths["greedy"]))
    with pytest.raises(DataError, match="not a bandit log"):
        broken.write_text("a,b\n1,2\n")
        main(Config(bandit_log=broken, bandit_target=paths["greedy"]))


def bandit_csv(path: Path, items: np.ndarray, clicks: np.ndarray, probability: np.ndarray) -> Path:
    rows = [f"{item},1,{int(click)},{p}" for item, click, p in zip(items, clicks, probability)]
    path.write_text("\n".join(["item_id,position,click,propensity_score", *rows]) + "\n")
    return path


def test_ids_of_items_may_be_of_any_size(tmp_path):
    """Seen: a MemoryError, of a table with a row for each number up to the largest id."""
    rng = np.random.default_rng(0)
    items, even = rng.integers(0, 3, 900), np.full(900, 1 / 3)
    clicks = rng.random(900) < 0.2
    found = []
    for name, ids in (("small", items), ("large", items + 10**12)):
        log = bandit_csv(tmp_path / f"{name}.csv", ids, clicks, even)
        assert main(Config(bandit_log=log, bandit_target=log, out=tmp_path / "f.json")) == 0
        found.append((tmp_path / "f.json").read_text())
    assert found[0] == found[1]


def test_an_estimate_that_is_not_above_0_has_no_interval(tmp_path, capsys):
    """Seen: "Out of range float values are not JSON compliant", a traceback."""
    logging = np.array([0.97, 0.03])
    rng = np.random.default_rng(18)
    items = rng.choice(2, 4000, p=logging)
    clicks = rng.random(4000) < np.array([0.3, 0.02])[items]
    log = bandit_csv(tmp_path / "log.csv", items, clicks, logging[items])
    target = bandit_csv(tmp_path / "target.csv", np.ones(500, int), np.zeros(500), np.ones(500))
    config = Config(bandit_log=log, bandit_target=target, out=tmp_path / "f.json", limits=Limits(10, 1, 0.05))
    assert main(config) == 0
    (dr,) = (one for one in json.loads(config.out.read_text())["forecasts"] if one["estimator"] == "DR")
    assert dr["value"] < 0 and dr["low"] is dr["lift"] is dr["lift_high"] is None
    assert f"DR     {dr['value']:.4f} clicks a page: not above 0, so there is no interval" in capsys.readouterr().out
