"""The score card: `ranker.json` beside every checkpoint. Whoever loads a checkpoint checks its card first."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ranking.chunks import Chunking
from ranking.errors import InputError
from ranking.files import write_text
from ranking.limits import FieldLimits

CARD_NAME = "ranker.json"
CARD_VERSION = 3  # 1 had the three limits as fields of the card itself, 2 knew no chunks


@dataclass
class ScoreCard:
    """What a checkpoint is and how its scores are to be read.

    Args:
        role: what the checkpoint does; a pretrained decoder is "pretrained" until it has a score head
        text_format: name of the text layout in ranking/text.py
        format_version: version of that layout; a checkpoint is only used with the layout it was trained on
        limits: how many tokens of each field the model was trained to read
        head: "linear" (hidden state -> one logit), "folded" (that head as one row of an LM head: for serving only),
            "none" for a pretrained decoder
        pooling: which position's state is scored: "last_token" (the end-of-sequence token), "mean", or "cls"
        chunking: how a student reads a summary beyond its limit, and makes one score of the chunks'
        score_mean: mean raw score on the dev split
        score_spread: standard deviation of raw scores on the dev split
        instruction: task that a foreign teacher's prompt states; empty for the prompt's own, or where it has none
        vocabulary: fingerprint of the tokenizer, from `fingerprint(tokenizer.json)`
        base_model: what training started from, by name: as `model_name` says it. A path is cut to its last name, since
            a served model's card is read by everybody who may ask the model
        trained_on: name -> fingerprint of every dataset file used
        judged_queries: judged train queries that it learnt from; None where nobody counted
        metrics: dev metrics of the kept checkpoint, by name
        calibration: optional monotone map from raw score to probability, see ranking/calibration_fit.py
    """

    role: Literal["pretrained", "teacher", "student", "baseline"]
    text_format: str
    format_version: int
    limits: FieldLimits
    head: Literal["linear", "folded", "none"]
    pooling: Literal["last_token", "mean", "cls"]
    chunking: Chunking = field(default_factory=Chunking)
    score_mean: float = 0.0
    score_spread: float = 1.0
    instruction: str = ""
    vocabulary: str = ""
    base_model: str = ""
    trained_on: dict[str, str] = field(default_factory=dict)
    judged_queries: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    version: int = CARD_VERSION

    def __post_init__(self):
        """ValueError names a field whose value means nothing."""
        if self.base_model.startswith("/"):  # a card of an earlier release
            self.base_model = self.base_model.rstrip("/").rpartition("/")[2]
        hints = get_type_hints(type(self))
        for name in ("role", "head", "pooling"):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, one of {', '.join(get_args(hints[name]))} is known"
                )
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise ValueError(f"format_version is {self.format_version!r}, a whole number from 1 on is needed")
        self.chunking.stride(self.limits.max_summary_tokens)
        if not math.isfinite(self.score_mean) or not 0 <= self.score_spread < math.inf:
            raise ValueError(
                f"score_mean is {self.score_mean}, score_spread is {self.score_spread}: finite scores are needed"
            )

    def save(self, folder: str | Path) -> Path:
        """Write ranker.json into a checkpoint folder."""
        path = Path(folder) / CARD_NAME
        write_text(path, self.to_json() + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> ScoreCard:
        """Read ranker.json of a checkpoint folder. InputError if it is absent or from_json refuses it."""
        path = Path(folder) / CARD_NAME
        if not path.is_file():
            refuse_unfinished(folder)
            raise InputError(f"{folder}: no {CARD_NAME}; this is not a DisRanker checkpoint")
        try:
            text = path.read_text(encoding="utf-8")
        except (ValueError, OSError) as problem:
            raise InputError(f"{path}: cannot be read as JSON: {problem}") from problem
        return cls.from_json(text, path)

    @classmethod
    def from_json(cls, text: str, where: str | Path) -> ScoreCard:
        """The card that to_json or an earlier release wrote. InputError names `where` and what is wrong."""
        try:
            content = json.loads(text)
        except ValueError as problem:
            raise InputError(f"{where}: cannot be read as JSON: {problem}") from problem
        if not isinstance(content, dict):
            raise InputError(f"{where}: not a score card: a JSON object is expected")
        if content.get("version") == 1:
            content = _from_version_1(content)
        if content.get("version") == 2:
            content = {**content, "chunking": {}, "version": 3}
        if content.get("version") != CARD_VERSION:
            raise InputError(
                f"{where}: card version {content.get('version')!r}, this release reads 1 to {CARD_VERSION}"
            )
        unknown = sorted(set(content) - {f.name for f in fields(cls)})
        if unknown:
            raise InputError(f"{where}: unknown keys {', '.join(unknown)}")
        limits = content.get("limits")
        if not isinstance(limits, dict):
            raise InputError(
                f"{where}: limits is {limits!r}: a JSON object with the token limit of each field is expected"
            )
        chunking = content.get("chunking")
        if not isinstance(chunking, dict):
            raise InputError(f"{where}: chunking is {chunking!r}: a JSON object (most, overlap, pooling) is expected")
        try:
            return cls(**{**content, "limits": FieldLimits(**limits), "chunking": Chunking(**chunking)})
        except (TypeError, ValueError) as problem:
            raise InputError(f"{where}: {problem}") from problem

    def to_json(self) -> str:
        """The card as the text of one JSON object."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    def require(self, folder: str | Path, *roles: str) -> ScoreCard:
        """Return self if the role is one of roles, else InputError: a teacher must not pass for a student."""
        if self.role not in roles:
            raise InputError(f"{folder}: this checkpoint is a {self.role}, a {' or '.join(roles)} is needed")
        return self


def refuse_unfinished(folder: str | Path) -> None:
    """InputError if a training lies in the folder that has not come to its end: its card is written last."""
    run = Path(folder, "training", "settings.json")
    if run.is_file() and not Path(folder, CARD_NAME).is_file():
        raise InputError(f"{folder}: no {CARD_NAME}: the training there has not finished; --resume goes on with it")


def require_adapted(checkpoint: str | Path) -> str:
    """The folder or name of the model that a checkpoint's adapter changes.

    InputError if its weights are not those of the training, as the checkpoint's card names them.
    """
    base = str(json.loads(Path(checkpoint, "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
    card = ScoreCard.load(checkpoint) if Path(checkpoint, CARD_NAME).is_file() else None
    trained_on = re.search(r"\(([0-9a-f]{16})\)", card.base_model) if card else None
    if card and trained_on and Path(base).is_dir() and trained_on[1] not in model_name(base):
        raise InputError(f"{checkpoint}: its adapter was trained on {card.base_model}; {base} holds other weights now")
    return base


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    names = [limit.name for limit in fields(FieldLimits)]
    limits = {name: content[name] for name in names if name in content}
    rest = {name: value for name, value in content.items() if name not in names}
    return {**rest, "limits": limits, "version": 2}


def model_name(model: str | Path) -> str:
    """A model as a card names it: a folder by its name and its weights' fingerprint, a hub id or a word as it is."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    weights = sorted(folder.glob("*.safetensors")) or [folder]
    return f"{folder.resolve().name} ({fingerprint(*weights)})"


def fingerprint(*paths: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of files' bytes (a folder: every file below with its name, sorted)."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        if not files:
            raise InputError(f"{path}: nothing there to fingerprint")
        for file in files:
            if file != path:
                digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]
