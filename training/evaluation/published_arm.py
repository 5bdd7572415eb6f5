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
    def read(cls, where: str) -> PublishedArm:
        """where: "ARM,CHECKPOINT": an arm's folder in the model repository, for the version promoted last, or one
        version's folder, and the checkpoint that it was built from, whose path no manifest tells.

        InputError if nothing is published there, or it was built from another checkpoint.
        """
        arm, comma, given = where.rpartition(",")
        if not comma:
            raise InputError(f"published:{where}: the checkpoint that the arm was built from is needed: ARM,CHECKPOINT")
        folder, checkpoint = Path(arm), Path(given)
        try:
            if (folder / "promoted.json").is_file():
                folder = folder / str(json.loads((folder / "promoted.json").read_text(encoding="utf-8"))[-1])
            content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            built_from = content["checkpoint"]["fingerprint"]
            quality = content["quality"]
            chunks = content["checkpoint"].get(
                "chunks", 1
            )  # this and the next are absent in earlier releases' versions
            served = content["checkpoint"].get("card", {}).get("chunking", {})
        except (OSError, ValueError, LookupError) as problem:
            raise InputError(f"{folder}: not a published arm of build/build_student.py: {problem!r}") from problem
        if content.get("cascade"):
            raise InputError(f"{folder}: a cascade of two models, whose ranking no single checkpoint gives")
        if fingerprint(checkpoint) != built_from:
            raise InputError(f"{checkpoint}: not what {folder} was built from, or changed since")
        if served.get("most", 1) < chunks:
            raise InputError(
                f"{folder}: serves at most {served['most']} chunks of a document where the checkpoint reads {chunks}, "
                "so the checkpoint's scores are not the served ones; the manifest has the figures of what is served"
            )
        return cls(checkpoint, PriorBlend(**quality["prior"]), quality["first_stage"])
