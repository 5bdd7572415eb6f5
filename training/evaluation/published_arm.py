"""A published arm as its callers meet it: its checkpoint's scores, blended with the first stage's by its manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.prior import PriorBlend


@dataclass(frozen=True)
class PublishedArm:
    """What a version's manifest says of it. first_stage: "bm25", or the name of the file that the prior is."""

    checkpoint: Path
    prior: PriorBlend
    first_stage: str

    @classmethod
    def read(cls, folder: Path) -> PublishedArm:
        """Of an arm's folder in the model repository, the version promoted last, or of one version's folder.

        InputError if nothing is published there, or its checkpoint is gone or changed.
        """
        try:
            if (folder / "promoted.json").is_file():
                folder = folder / str(json.loads((folder / "promoted.json").read_text(encoding="utf-8"))[-1])
            content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            checkpoint = Path(content["checkpoint"]["path"])
            quality = content["quality"]
        except (OSError, ValueError, LookupError) as problem:
            raise InputError(f"{folder}: not a published arm of build/build_student.py: {problem!r}") from problem
        if fingerprint(checkpoint) != content["checkpoint"]["fingerprint"]:
            raise InputError(f"{checkpoint}: changed since {folder} was built from it")
        return cls(checkpoint, PriorBlend(**quality["prior"]), quality["first_stage"])
