"""The product in ten cells, run by tests/test_story.py; the documentation's site shows it as a page."""

# %% [markdown]
# # The story in ten cells
# What DisRanker does, from a click log to an A/B verdict, on a synthetic world of a size that two cores take a minute
# for. Each cell is a stage of the product, called as its program calls it; `# >` lines are what it printed. Run the
# file as it is, or open it in an editor that knows `# %%` cells. At this size the figures show how the parts fit
# together and no more; [results/demo.md](results/demo.md) and the pages beside it have those to judge by.

# %%
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from build import build_student
from clients.ab.report.statistics import UserTotals, compare_arms, estimate
from ranking.click_models import ClickModel
from ranking.labels import read_labels
from training import blend_labels, distill_student, evaluate, prepare_data, train_baseline
from training.world.dataset import WorldConfig

logging.disable(logging.WARNING)
work = Path(tempfile.mkdtemp(prefix="story-"))
data = work / "data"

# %% [markdown]
# ## 1. A world with clicks
# Documents, queries and simulated users are generated ([world.md](world.md)). Searchers use other words than documents
# do, which is what makes ranking hard; in your own case this is your click log and your judgments.

# %%
prepare_data.main(prepare_data.Config(source="world", out=data, world=WorldConfig.small(judged_documents=8)))
world = json.loads((data / "dataset.json").read_text())
print(f"{world['counts']['events']:,} rows of a click log, {world['counts']['queries_train']} judged train queries")
pairs = pq.read_table(data / "judgments" / "test.parquet").to_pylist()
best = next(p for p in pairs if p["grade"] == 4 and not set(p["query"].split()) & set(p["title"].lower().split()))
print(f"somebody types {best['query']!r} and means {best['title']!r}: no word in common")
# > 28,800 rows of a click log, 40 judged train queries
# > somebody types 'smooth potato topped meat' and means "Creamy shepherd's pie for leftovers by Blue Plate": no word in common

# %% [markdown]
# ## 2. Clicks are biased by position
# People look at the top of a page. `prepare_clicks` estimated how often each position is looked at, from documents that
# stood at several; here the truth is known too. Click pairs are weighted by it ([clicks.md](clicks.md)).

# %%
report = json.loads((data / "clicks.report.json").read_text())
estimated = list(report["position_bias"]["propensities"].values())
for position in (1, 2, 5):
    true = world["click_model"]["propensities"][position - 1]
    print(f"position {position}: estimated {estimated[position - 1]:.2f}, true {true:.2f}")
# > position 1: estimated 1.00, true 1.00
# > position 2: estimated 0.84, true 0.78
# > position 5: estimated 0.41, true 0.41

# %% [markdown]
# ## 3. What ranks today
# BM25 counts words. Whatever comes later is compared with it.

# %%
evaluate.main(evaluate.Config(data=data, system=["bm25", "random"], out=work / "today", permutations=500))
# > | system | PNR   | NDCG@1 | NDCG@5 | NDCG@10 | MRR    | ties   | queries | NDCG@5 95% CI    | difference to the first [95% CI] | p      |
# > |--------|-------|--------|--------|---------|--------|--------|---------|------------------|----------------------------------|--------|
# > | bm25   | 2.717 | 0.4875 | 0.6499 | 0.7413  | 0.7704 | 43.01% | 40      | 0.5740 to 0.7252 |                                  |        |
# > | random | 0.955 | 0.2062 | 0.4550 | 0.6086  | 0.6225 | 0.00%  | 40      | 0.3862 to 0.5137 | -0.1949 [-0.3079, -0.0825]       | 0.0020 |

# %% [markdown]
# ## 4. A teacher writes labels
# The paper's teacher is an LLM, pre-trained on the clicks and fine-tuned on judgments ([teacher.md](teacher.md)). Where
# there is none, a blend of BM25 and the embedding similarity of MiniLM-L6 needs no judgment; judged dev queries weight
# its parts. It scores every candidate, judged or not.

# %%
blend_labels.main(blend_labels.Config(data=data, out=work / "labels"))
print(f"{read_labels(work / 'labels').num_rows} labels of queries that nobody judged")
# > 720 labels of queries that nobody judged

# %% [markdown]
# ## 5. A student learns them
# Three layers of 128 from random weights, a few passes: margins between the teacher's scores, and the scores themselves
# ([students.md](students.md)).

# %%
small = {"size": "mini-3", "vocabulary_size": 2000, "batch_groups": 8, "learning_rate": 1e-3}
distill_student.main(
    distill_student.Config(data=data, labels=work / "labels", out=work / "student", epochs=12, **small)
)

# %% [markdown]
# ## 6. A baseline learns the judgments
# The same BERT without a teacher: what a team has before it distils.

# %%
train_baseline.main(train_baseline.Config(data=data, out=work / "baseline", epochs=6, **small))

# %% [markdown]
# ## 7. Who ranks best?
# Queries of the test split, which nobody has seen, with intervals over the queries ([data.md](data.md)). The teacher is
# far above BM25. Baseline and student are below it: 40 judged queries and 720 labels teach random weights next to
# nothing. That is why own data start from a pretrained MiniLM, and why `make demo` labels 80,000 pairs.

# %%
systems = [
    "bm25", f"baseline=checkpoint:{work / 'baseline'}", f"teacher=blend:{work / 'labels'}",
    f"student=checkpoint:{work / 'student'}",
]  # fmt: skip
evaluate.main(evaluate.Config(data=data, system=systems, out=work / "evaluation", permutations=500))
# > | system   | PNR   | NDCG@1 | NDCG@5 | NDCG@10 | MRR    | ties   | queries | NDCG@5 95% CI    | difference to the first [95% CI] | p      |
# > |----------|-------|--------|--------|---------|--------|--------|---------|------------------|----------------------------------|--------|
# > | bm25     | 2.717 | 0.4875 | 0.6499 | 0.7413  | 0.7704 | 43.01% | 40      | 0.5740 to 0.7252 |                                  |        |
# > | baseline | 1.076 | 0.2062 | 0.4716 | 0.6144  | 0.6082 | 0.00%  | 40      | 0.3923 to 0.5523 | -0.1783 [-0.2897, -0.0577]       | 0.0040 |
# > | teacher  | 4.669 | 0.7438 | 0.8468 | 0.8830  | 0.9396 | 0.00%  | 40      | 0.7843 to 0.8960 | +0.1969 [+0.1307, +0.2661]       | 0.0020 |
# > | student  | 1.261 | 0.2437 | 0.4842 | 0.6259  | 0.5942 | 0.00%  | 40      | 0.4001 to 0.5654 | -0.1657 [-0.2732, -0.0595]       | 0.0060 |
# >
# > | against teacher | PNR kept | NDCG@5 kept | NDCG@10 kept | MRR kept | Kendall tau |
# > |-----------------|----------|-------------|--------------|----------|-------------|
# > | bm25            | 58.2%    | 76.8%       | 84.0%        | 82.0%    | 0.4702      |
# > | baseline        | 23.0%    | 55.7%       | 69.6%        | 64.7%    | -0.0232     |
# > | teacher         | 100.0%   | 100.0%      | 100.0%       | 100.0%   | 1.0000      |
# > | student         | 27.0%    | 57.2%       | 70.9%        | 63.2%    | 0.1179      |
# >
# > | calibration | ECE of the raw logit | ECE after the card's map |
# > |-------------|----------------------|--------------------------|
# > | baseline    | 0.2136               | none                     |
# > | teacher     | 0.1247               | none                     |
# > | student     | 0.1050               | none                     |

# %% [markdown]
# ## 8. The gate
# Compiling a model may move its scores, and a model may be worse than what ranks today. `build_student` publishes
# neither ([build.md](build.md)). Twenty judged queries tell only large differences, so a reason in words is given here:
# it publishes past the second check, and stays in the manifest.

# %%
built = build_student.Config(
    work / "student", "student", "openvino", data, repository=work / "model_repository", precision="fp32",
    gate_queries=20, reference_pairs=100, accept_worse="a story of a minute",
)  # fmt: skip
build_student.main(built)
manifest = json.loads((work / "model_repository" / "student" / "1" / "manifest.json").read_text())
print(f"engine against checkpoint: Kendall tau {manifest['gate']['tau']:.3f}")
# > engine against checkpoint: Kendall tau 1.000

# %% [markdown]
# ## 9. Users decide
# Simulated users of two arms see the test queries' documents in the order of their arm's scores. The difference has an
# interval clustered by user ([ab-report.md](ab-report.md)): this student must not be launched. In the product both arms
# are served by Triton behind a router that logs each page ([ab-router.md](ab-router.md)).

# %%
scores = pq.read_table(work / "evaluation" / "scores.parquet").to_pylist()
rng = np.random.default_rng(1)


def user_totals(arm: str, users: int, pages: int = 3) -> UserTotals:
    """Clicked pages and pages of each user, who sees eight documents in the arm's order."""
    of_query: dict[str, list] = {}
    for row in sorted(scores, key=lambda row: -row[arm]):
        of_query.setdefault(row["query_id"], []).append(row["grade"])
    ranked = np.array([grades[:8] for grades in of_query.values()])
    shown = ranked[rng.integers(0, len(ranked), users * pages)]
    clicked = ClickModel().simulate(shown, rng).clicked.any(axis=1).reshape(users, pages)
    return UserTotals(clicked.sum(axis=1).astype(float), np.full(users, float(pages)))


found = compare_arms(*(estimate(user_totals(arm, users=1500)) for arm in ("bm25", "student")))
print(f"page CTR {found.control:.1%} with BM25, {found.treatment:.1%} with the student")
print(f"lift {found.lift:+.1%}, 95% interval {found.low:+.1%} to {found.high:+.1%}")
# > page CTR 74.5% with BM25, 65.1% with the student
# > lift -12.6%, 95% interval -15.0% to -10.2%

# %% [markdown]
# ## 10. From here
# `make demo` runs all of this on real servers and at a size whose figures mean something, with an LLM's architecture as
# teacher; `make demo DATA=...` does it on your data. The page [Start here](index.md) has three ways in.

# %%
print(*sorted(path.name for path in (work / "model_repository").iterdir()))
# > student student_encoder
