"""Publish an encoder reranker that others trained as a Triton model: query, title, summary -> score.

    python build/build_cross_encoder.py --checkpoint models/bge-reranker-v2-m3 --name foreign

BERT, RoBERTa, XLM-R, ModernBERT: any folder that transformers opens as a sequence classifier with one score. It is
served as it is, by PyTorch (serving/cross_encoder/model.py), in any container or venv that has torch and transformers;
label it with `clients/label_corpus.py --teacher-kind ranker`.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from google.protobuf import text_format
from transformers import AutoConfig, AutoModelForSequenceClassification
from tritonclient.grpc import model_config_pb2 as pb

from build.publication_settings import RepositorySettings, check_model_name
from build.publish import FRONT_MODULES, ROOT
from build.releases import check_holds_no_arm, numbers
from build.triton_config import as_parameters
from ranking.card import ScoreCard, fingerprint
from ranking.cross_encoder_text import CROSS_ENCODER_FORMAT, CrossEncoderFormat
from ranking.errors import InputError
from ranking.files import replacing_folder
from ranking.limits import DEFAULT_LIMITS, MAX_DOCUMENTS, FieldLimits
from ranking.program import run
from ranking.text import FORMAT_VERSION, load_tokenizer

LOGGER = logging.getLogger(__name__)
SOURCES = ("serving/cross_encoder/model.py", "serving/front/request_fields.py")


@dataclass
class Config(RepositorySettings):
    """Publish an encoder reranker that others trained.

    Args:
        checkpoint: its downloaded Hugging Face folder: safetensors, config.json, tokenizer.json
        name: name of the Triton model
        dtype: number format of the network; bfloat16 or float16 on a GPU
        limits: token limits per field
        max_documents: documents in one request
        batch_tokens: padded tokens of one forward; raise it on a GPU
        threads: CPU threads of the network, 0 for PyTorch's own choice
    """

    checkpoint: Path
    name: str = "foreign"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    limits: FieldLimits = DEFAULT_LIMITS
    max_documents: int = MAX_DOCUMENTS
    batch_tokens: int = 4096
    threads: int = 0

    def __post_init__(self) -> None:
        check_model_name(self.name)
        for name in ("max_documents", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")


def main(config: Config) -> None:
    """Check the folder, write the version beside the repository and rename it into place."""
    card = check(config.checkpoint, config.limits)
    target = config.repository / config.name
    check_holds_no_arm(target)
    config.repository.mkdir(parents=True, exist_ok=True)
    version = str(max(numbers(target), default=0) + 1)
    # beside the repository, because a server takes every folder inside it for a model
    with replacing_folder(target, aside_in=config.repository.absolute().parent) as aside:
        checkpoint = aside / version / "checkpoint"
        checkpoint.mkdir(parents=True)
        for pattern in ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json"):
            for file in config.checkpoint.glob(pattern):
                shutil.copy2(file, checkpoint / file.name)
        card.save(checkpoint)
        for source in SOURCES:
            shutil.copy2(ROOT / source, aside / version / Path(source).name)
        (aside / version / "ranking").mkdir()
        for source in (*FRONT_MODULES, "ranking/cross_encoder_text.py"):
            shutil.copy2(ROOT / source, aside / version / source)
        identity = fingerprint(checkpoint)
        (aside / "config.pbtxt").write_text(text_format.MessageToString(triton_config(config, card, identity)))
    LOGGER.info("published %s version %s (%s, teacher %s)", target, version, config.dtype, identity)


def check(folder: Path, limits: FieldLimits) -> ScoreCard:
    """The card of an encoder reranker. InputError: no classifier with one score, weights missing, pairs too long."""
    text = CrossEncoderFormat(load_tokenizer(folder), limits)
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.num_labels != 1:
            raise InputError(f"{folder}: {config.num_labels} labels; a reranker has one score")
        _, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise InputError(f"{folder}: cannot be opened as a sequence classifier: {reason}") from problem
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{folder}: weights without a value: {', '.join(missing[:3])}; this is no trained reranker")
    # RoBERTa's kind counts positions from behind the padding id
    reserved = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    positions = config.max_position_embeddings - reserved
    if text.max_tokens() > positions:
        raise InputError(
            f"{folder}: pairs of up to {text.max_tokens()} tokens, the model has {positions} positions; lower --limits"
        )
    return ScoreCard(
        role="teacher",
        text_format=CROSS_ENCODER_FORMAT,
        format_version=FORMAT_VERSION,
        limits=limits,
        head="linear",
        pooling="cls",
        vocabulary=fingerprint(folder / "tokenizer.json"),
        base_model=folder.name,
    )


def triton_config(config: Config, card: ScoreCard, identity: str) -> pb.ModelConfig:
    """config.pbtxt as a message: a ranker's tensors, and as metric tags, as of every ranker, which one it is."""
    parameters = {
        "ranker_card": card.to_json(),
        "dtype": config.dtype,
        "max_documents": str(config.max_documents),
        "batch_tokens": str(config.batch_tokens),
        "threads": str(config.threads),
    }
    text = pb.TYPE_STRING
    return pb.ModelConfig(
        backend="python",
        input=[
            pb.ModelInput(name="query", data_type=text, dims=[1]),
            pb.ModelInput(name="title", data_type=text, dims=[-1]),
            pb.ModelInput(name="summary", data_type=text, dims=[-1]),
        ],
        output=[pb.ModelOutput(name="score", data_type=pb.TYPE_FP32, dims=[-1])],
        # PyTorch picks its device; several requests at a time would only share it
        metric_tags={"arm": config.name, "role": card.role, "precision": config.dtype, "checkpoint": identity},
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        parameters=as_parameters(parameters),
    )


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python build/build_cross_encoder.py --checkpoint models/bge-reranker-v2-m3 --name foreign",
    )
