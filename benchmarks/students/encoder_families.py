"""Students of several encoder families on real text: the same scores in sentence-transformers, and padding when served.

python -m benchmarks.students.encoder_families --data data/msrd

For each family: the largest difference between this project's scores and those of sentence-transformers' CrossEncoder
on judged pairs that are within the field limits (beyond them the two cut differently, by design), and the tokens that
the front model's encoder calls hold for each real one. Rounding alone moves a score with the batch it is in, most of
all where a small random spread is scaled up: CrossEncoder's difference to itself stands beside. BERT is
all-MiniLM-L6-v2. No pretrained XLM-R or ModernBERT is at hand, so those are small models of random weights, whose
tokenizers (Unigram pieces, byte-level BPE) are trained on the dataset's own text; heads are scaled to a spread of 1.
`--checkpoint` measures a trained student instead of BERT's.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, ModernBertConfig, PreTrainedTokenizerFast, XLMRobertaConfig

from benchmarks.serving.encoder_calls import count_calls
from benchmarks.students.runs import text_columns
from build.triton_config import ServingLimits
from ranking.card import ScoreCard, fingerprint
from ranking.limits import FieldLimits
from ranking.program import run
from ranking.schema import read_table
from ranking.text import FORMAT_VERSION, StudentFormat, normalise
from training.evaluation.checkpoint_scores import score_pairs
from training.student.encoder import StudentModelSettings, create_student, scale_head
from training.student.model_card import describe_for_others, limit_other_tokenizers

VOCABULARY = 8000
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LIMITS = FieldLimits(max_query_tokens=32, max_title_tokens=48, max_summary_tokens=384)
BUCKET_STEPS = (16, 8)


@dataclass
class Config:
    """Compare scores with CrossEncoder's, and count padding.

    Args:
        data: dataset folder with test judgments
        checkpoint: a student to measure in BERT's row; none: MiniLM with a new head
        pairs: judged pairs whose scores are compared
        list_documents: documents of a list whose encoder calls are counted
    """

    data: Path
    checkpoint: Path | None = None
    pairs: int = 500
    list_documents: int = 48


def main(config: Config) -> None:
    """Print the table in Markdown."""
    rows = read_table(config.data / "judgments" / "test.parquet", "judgments")
    texts = [" ".join(fields) for fields in zip(*text_columns(rows))]
    columns = [f"encoded over real, buckets of {step}" for step in BUCKET_STEPS]
    differences = "largest difference | CrossEncoder in batches of 32 less one by one"
    print(f"| student | pairs | spread | {differences} | median tokens | {' | '.join(columns)} |")
    print("|---|--:|--:|--:|--:|--:|" + "--:|" * len(columns))
    with tempfile.TemporaryDirectory() as work:
        for family in ("bert", "xlm-roberta", "modernbert"):
            checkpoint = config.checkpoint if family == "bert" else None
            checkpoint = checkpoint or make_student(family, Path(work) / family, config.data, rows, texts)
            found = [*parity(checkpoint, rows, config.pairs), *padding(checkpoint, rows, config.list_documents)]
            print(f"| {family} | " + " | ".join(found) + " |", flush=True)


def parity(checkpoint: Path, rows: Any, pairs: int) -> list[str]:
    """Number of pairs, spread of our scores, the largest difference to CrossEncoder's, and its own to itself."""
    text = StudentFormat.of_checkpoint(checkpoint)
    limits = (text.limits.max_query_tokens, text.limits.max_title_tokens, text.limits.max_summary_tokens)
    fields = [[normalise(value) for value in column] for column in text_columns(rows)]
    lengths = [[len(ids) for ids in text.tokenise_fields(f, limit + 1)] for f, limit in zip(fields, limits)]
    short = [n for n, sizes in enumerate(zip(*lengths)) if all(size <= most for size, most in zip(sizes, limits))]
    chosen = np.random.default_rng(0).permutation(short)[:pairs]
    queries, titles, summaries = ([column[n] for n in chosen] for column in fields)
    ours = score_pairs(checkpoint, queries, titles, summaries)
    documents = [f"{title} {summary}".strip() for title, summary in zip(titles, summaries)]
    model, asked = CrossEncoder(str(checkpoint), device="cpu"), list(zip(queries, documents))
    theirs, singly = (model.predict(asked, batch_size=size, show_progress_bar=False) for size in (32, 1))
    differences = (f"{np.abs(theirs - others).max():.1e}" for others in (ours, singly))
    return [str(len(chosen)), f"{ours.std():.2f}", *differences]


def padding(checkpoint: Path, rows: Any, documents: int) -> list[str]:
    """The median pair's tokens, and encoded tokens over real ones on OpenVINO, for each of BUCKET_STEPS."""
    text = StudentFormat.of_checkpoint(checkpoint)
    lengths = [len(pair.ids) for pair in text.encode(*text_columns(rows))]
    lists = [lengths[at : at + documents] for at in range(0, len(lengths), documents)]
    found = [f"{np.median(lengths):.0f}"]
    for step in BUCKET_STEPS:
        calls = count_calls(lists, ServingLimits(bucket_step=step), text.max_tokens(), "openvino")
        found.append(f"{calls['encoded tokens over real']:.3f}")
    return found


def make_student(family: str, folder: Path, data: Path, rows: Any, texts: list[str]) -> Path:
    """A student's folder as training writes it: the family's encoder with a new head, whose scores have a spread of 1.

    texts: what a tokenizer is trained on where no pretrained one is at hand.
    """
    start = "minilm" if family == "bert" else str(_random_encoder(family, folder.with_name(f"{family}-start"), texts))
    student = create_student(StudentModelSettings(init=start, limits=LIMITS), data, folder, seed=0)
    describe_for_others(student.model.config)
    card = ScoreCard(
        "student", student.text_format.name, FORMAT_VERSION, LIMITS, "linear", "cls",
        vocabulary=fingerprint(student.tokenizer_folder / "tokenizer.json"),
    )  # fmt: skip
    for file in student.tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    limit_other_tokenizers(folder, student.text_format.max_tokens())
    card.save(folder)
    student.model.save_pretrained(folder)
    sample = [column[:100] for column in text_columns(rows)]
    scale_head(student.model, 1 / float(score_pairs(folder, *sample).std()), 0.0)
    student.model.save_pretrained(folder)
    return folder


def _random_encoder(family: str, folder: Path, texts: list[str]) -> Path:
    """An encoder of random weights whose tokenizer, of its family's kind, is trained on the texts."""
    if family == "xlm-roberta":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trainer: Any = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=marks, unk_token="<unk>")
        template, first, last, pad, unknown = "<s> $A </s> </s> $B </s>", "<s>", "</s>", "<pad>", "<unk>"
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        marks = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=marks, initial_alphabet=alphabet)
        template, first, last, pad, unknown = "[CLS] $A [SEP] $B [SEP]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"
    tokenizer.train_from_iterator(texts, trainer)
    numbered = [(mark, tokenizer.token_to_id(mark)) for mark in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A {last}", template, numbered)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=last,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    of_family = {"xlm-roberta": XLMRobertaConfig, "modernbert": ModernBertConfig}[family]
    pad_id = tokenizer.token_to_id(pad)
    settings = of_family(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=514, pad_token_id=pad_id,
        bos_token_id=numbered[0][1], cls_token_id=numbered[0][1], sep_token_id=numbered[1][1],
        eos_token_id=numbered[1][1], **SHAPE,
    )  # fmt: skip
    AutoModel.from_config(settings).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.encoder_families --data data/msrd")
