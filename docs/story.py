"""The product in ten cells, run by tests/test_story.py; the documentation's site shows it as a page."""

# %% [markdown]
# # The story in ten cells
# What DisRanker does, from a click log to an A/B verdict, on a synthetic world of a size that two cores take a minute
# for. Each cell is a stage of the product, called as its program calls it; `#>` lines are what it printed. Run the file
# as it is, or open it in an editor that knows `# %%` cells. At this size the figures show how the parts fit together
# and no more; [results/demo.md](results/demo.md) and the pages beside it have those to judge by.

# %%
import json
import logging
import os
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
os.environ["TQDM_DISABLE"] = "1"
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
# > 7,470 rows of a click log, 40 judged train queries
# > somebody types 'x' and means 'y': no word in common

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

# %% [markdown]
# ## 3. What ranks today
# BM25 counts words. Whatever comes later is compared with it.

# %%
evaluate.main(evaluate.Config(data=data, system=["bm25", "random"], out=work / "today", permutations=500))

# %% [markdown]
# ## 4. A teacher writes labels
# The paper's teacher is an LLM, pre-trained on the clicks and fine-tuned on judgments ([teacher.md](teacher.md)). Where
# there is none, a blend of BM25 and the embedding similarity of MiniLM-L6 needs no judgment; judged dev queries weight
# its parts. It scores every candidate, judged or not.

# %%
blend_labels.main(blend_labels.Config(data=data, out=work / "labels"))
print(f"{read_labels(work / 'labels').num_rows} labels of queries that nobody judged")

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
# Queries of the test split, which nobody has seen, with intervals over the queries ([data.md](data.md)).

# %%
systems = [
    "bm25", f"baseline=checkpoint:{work / 'baseline'}", f"teacher=blend:{work / 'labels'}",
    f"student=checkpoint:{work / 'student'}",
]  # fmt: skip
evaluate.main(evaluate.Config(data=data, system=systems, out=work / "evaluation", permutations=500))

# %% [markdown]
# ## 8. The gate
# Compiling a model may move its scores, and a model may be worse than what ranks today. `build_student` publishes
# neither ([build.md](build.md)); a reason given in words publishes past the second check, and stays in the manifest.

# %%
built = build_student.Config(
    work / "student", "student", "openvino", data, repository=work / "model_repository", precision="fp32",
    gate_queries=20, reference_pairs=100, accept_worse="a story of a minute",
)  # fmt: skip
build_student.main(built)
manifest = json.loads((work / "model_repository" / "student" / "1" / "manifest.json").read_text())
print(f"engine against checkpoint: Kendall tau {manifest['gate']['tau']:.3f}")
print("objections:", *(manifest["quality"]["objections"] or ["none"]), sep="\n  ")

# %% [markdown]
# ## 9. Users decide
# Simulated users of two arms see the test queries' documents in the order of their arm's scores. The difference has an
# interval clustered by user ([ab-report.md](ab-report.md)). In the product both arms are served by Triton behind a
# router that logs each page ([ab-router.md](ab-router.md)).

# %%
scores = pq.read_table(work / "evaluation" / "scores.parquet").to_pandas()
rng = np.random.default_rng(1)


def user_totals(arm: str, users: int, pages: int = 3) -> UserTotals:
    """Clicked pages and pages of each user, who sees documents in the arm's order."""
    ranked = scores.sort_values(arm, ascending=False, kind="stable").groupby("query_id")["grade"].apply(list)
    shown = np.array([grades[:8] for grades in ranked])[rng.integers(0, len(ranked), users * pages)]
    clicked = ClickModel().simulate(shown, rng).clicked.any(axis=1).reshape(users, pages)
    return UserTotals(clicked.sum(axis=1).astype(float), np.full(users, float(pages)))


found = compare_arms(*(estimate(user_totals(arm, users=1500)) for arm in ("bm25", "student")))
print(f"page CTR {found.control:.1%} with BM25, {found.treatment:.1%} with the student")
print(f"lift {found.lift:+.1%}, 95% interval {found.low:+.1%} to {found.high:+.1%}")

# %% [markdown]
# ## 10. From here
# `make demo` runs all of this on real servers and at a size whose figures mean something, with an LLM's architecture as
# teacher; `make demo DATA=...` does it on your data. The page [Start here](index.md) has three ways in.

# %%
print(*sorted(path.name for path in (work / "model_repository").iterdir()))
