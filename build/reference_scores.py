"""What a published version scored when it was built: the reference that ab_watch compares live scores and text with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from build.judged_pairs import read_candidate_fields
from build.runners import Runner, score_documents
from ranking.text import StudentFormat
from ranking.text_figures import text_figures

REFERENCE_NAME = "reference.json"


def reference_of(data: Path, text: StudentFormat, runner: Runner, pairs: int) -> dict[str, Any]:
    """Scores, ascending, of up to `pairs` candidates of the dataset by the fp32 checkpoint, and figures of their text.

    Plain JSON: {"source", "scores": [n], "text": TextFigures}. InputError if the dataset has no pairs.
    """
    source, fields = read_candidate_fields(data, pairs)
    scores = score_documents(runner, text.encode_documents(*fields), text.pad_id, "reference scores")
    return {
        "source": source,
        "scores": np.sort(scores).astype(float).round(6).tolist(),
        "text": asdict(text_figures(text, *fields)),
    }
