"""What makes a checkpoint folder of use to others: settings by which other libraries give the same scores, a model
card, and the way to a model hub.

    from sentence_transformers import CrossEncoder
    CrossEncoder("runs/student").predict([("night train", "title summary")])

    from transformers import pipeline
    pipeline("text-classification", "runs/student")({"text": "night train", "text_pair": "title summary"})

Both give the raw score. They read a document as one text, so a title or summary beyond its own token limit, and text
that normalisation changes (ranking.text), are read otherwise than by this project's server.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.files import write_json, write_text

LOGGER = logging.getLogger(__name__)

CARD_FILE = "README.md"

_CARD = """---
library_name: sentence-transformers
pipeline_tag: text-ranking
tags:
- cross-encoder
- disranker
---

# {title}

A cross-encoder that scores how relevant a document is to a query: a {role} of DisRanker. The score is an unbounded
logit; higher is more relevant. It started from {base}.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{title}")
scores = model.predict([("query", "title summary")])  # raw logits
```

The model reads `{text_format}` (version {format_version}): the first {query} tokens of the query, {document_title} of
the title and {summary} of the summary.{chunks} Other libraries join title and summary with a space and cut the pair as
a whole, so scores agree for texts within these limits.

## Scores on the dev judgments
| metric | value |
|---|---|
{metrics}

Raw scores there have the mean {mean:.4f} and the spread {spread:.4f}.{calibration}

## Training data
| table | fingerprint |
|---|---|
{data}

Judged train queries: {judged}. The fingerprint of a table is a hash of its content; `ranker.json` holds the same
figures for programs.
"""


def describe_for_others(config: Any) -> None:
    """Set what makes transformers' pipeline and sentence-transformers give raw scores. config: the model's."""
    config.problem_type = "regression"  # else a pipeline applies the logistic function to the one logit
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    config.id2label, config.label2id = {0: "relevance"}, {"relevance": 0}


def limit_other_tokenizers(folder: Path, most_tokens: int) -> None:
    """Let other libraries cut a pair at the length that the model was trained with. folder: of the checkpoint."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, content | {"model_max_length": most_tokens})


def write_model_card(folder: Path, card: ScoreCard) -> None:
    """Write the checkpoint's README.md from its score card."""
    limits = card.limits
    calibrated = card.calibration["kind"] if card.calibration else ""
    text = _CARD.format(
        title=folder.resolve().name,
        role=card.role,
        base=card.base_model,
        text_format=card.text_format,
        format_version=card.format_version,
        query=limits.max_query_tokens,
        document_title=limits.max_title_tokens,
        summary=limits.max_summary_tokens,
        chunks=_of_chunks(card),
        metrics=_rows({name: f"{value:.4f}" for name, value in card.metrics.items()}),
        mean=card.score_mean,
        spread=card.score_spread,
        calibration=f" `ranker.json` has a map from score to probability ({calibrated})." if calibrated else "",
        data=_rows({name: f"`{digest}`" for name, digest in card.trained_on.items()}),
        judged="not counted" if card.judged_queries is None else card.judged_queries,
    )
    write_text(folder / CARD_FILE, text)


def _of_chunks(card: ScoreCard) -> str:
    if card.chunking.most == 1:
        return ""
    score = "highest" if card.chunking.pooling == "max" else "mean"
    return (
        f" A longer summary is read as up to {card.chunking.most} chunks of that length, each of which begins with the "
        f"last {card.chunking.overlap} tokens of the one before; the score is the {score} of the chunks' scores. Other "
        "libraries read the first chunk alone."
    )


def _rows(values: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items()) or "| none | |"


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload the checkpoint, without the run's states, to a private repository of a model hub; returns its address.

    repository: owner/name. The hub and the token are huggingface_hub's own (HF_ENDPOINT, HF_TOKEN). InputError if the
    hub cannot be reached or refuses; the folder is whole all the same.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    files = [path.name for path in folder.iterdir() if path.is_file()]
    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)
    except (HTTPError, HFValidationError, OSError) as problem:  # HTTPError is that of the library's HTTP client
        reason = " ".join(str(problem).split())[:300]
        raise InputError(f"--push-to-hub {repository}: {reason}; the checkpoint is in {folder}") from problem
    LOGGER.info("%s uploaded: %s", folder, done)
    return str(done)
