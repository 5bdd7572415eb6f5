"""Label a corpus through the store: find the texts that it lacks, have them labelled, read the whole corpus out of it.

    OUT/keys.parquet      the key of every row
    OUT/missing.parquet   the rows to label: each text that the store lacked when the run began, once
    OUT/new/              their labels folder
    OUT/labels-*          the labels folder of the whole corpus, as every reader of ranking/labels.py takes it

Each of these is written aside and renamed into place, and none is made again once it stands: a run that was killed goes
on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.label_folder import LabelFolder
from clients.labelling.label_store import BATCH_ROWS, KEYS_SCHEMA, RUN_SCHEMA, LabelStore, write_batches, write_keys
from clients.labelling.scored_rows import write_scored
from ranking.errors import InputError
from ranking.files import replacing
from ranking.labels import LabelSet, iter_labelled
from ranking.pair_keys import pair_keys

logger = logging.getLogger("labels")

KEYS_NAME, MISSING_NAME, NEW_FOLDER = "keys.parquet", "missing.parquet", "new"
TEXTS = ["query", "title", "summary"]
PAIR_SCHEMA = pa.schema([KEYS_SCHEMA.field("key_high"), KEYS_SCHEMA.field("key_low")])


def find_missing(store: LabelStore, candidates: CandidateFile, out: Path) -> CandidateFile:
    """The candidates that the store has no label for, each text once: OUT/missing.parquet, made if absent.

    InputError if it was made for a store that had labels which this one lacks: nobody would ask for those.
    """
    keys, missing = out / KEYS_NAME, out / MISSING_NAME
    if not keys.exists():
        write_keys(candidates, keys)
    if not missing.exists():
        count = store.missing(keys, candidates, missing)
        logger.info("%d of %d pairs are not in the store yet", count, candidates.rows)
    elif lost := store.lacks(keys, pa.RecordBatchReader.from_batches(PAIR_SCHEMA, _keys_of(missing))):
        raise InputError(
            f"{out}: {store.folder} lacks {lost} labels that the store had when this folder was begun; give "
            "the --store of that run, or another --out"
        )
    return CandidateFile.open(missing)


def _keys_of(missing: Path) -> Iterator[pa.RecordBatch]:
    """The key of each row, PAIR_SCHEMA's columns."""
    for texts in pq.ParquetFile(missing).iter_batches(BATCH_ROWS, columns=TEXTS):
        high, low = pair_keys(*(texts.column(name).to_pylist() for name in TEXTS))
        yield pa.record_batch([pa.array(high), pa.array(low)], schema=PAIR_SCHEMA)


def store_new_labels(store: LabelStore, missing: CandidateFile, out: Path) -> int:
    """Add the finished labels of OUT/new to the store as one run; nothing is added twice. Returns the labels added."""
    new = out / NEW_FOLDER
    labelled = out / "new.parquet"

    def batches() -> Iterator[pa.RecordBatch]:
        for table in iter_labelled(missing.path, new):
            high, low = pair_keys(*(table.column(name).to_pylist() for name in TEXTS))
            scores = table.column("teacher_score").combine_chunks()
            yield pa.record_batch([pa.array(high), pa.array(low), scores], schema=RUN_SCHEMA)

    with replacing(labelled) as aside:
        write_batches(aside, RUN_SCHEMA, batches())
    added = store.add(labelled, source=_source(new))
    labelled.unlink()
    return added


def fill_folder(store: LabelStore, folder: LabelFolder, retry_rejects: bool = False) -> dict:
    """Write a corpus's labels folder out of the store, those shards that are not finished. Returns the manifest."""
    reason = f"the teacher gave no score for this text; see {NEW_FOLDER}/rejects.parquet"
    return write_scored(folder, store.scores(folder.folder / KEYS_NAME, folder.folder), reason, retry_rejects)


def _source(labels: Path) -> str:
    """A labels folder's content in 16 hex digits, whatever its manifest says of dates and rates."""
    digest = hashlib.sha256()
    for shard in LabelSet.load(labels).shards:
        digest.update(shard.sha256.encode())
    return digest.hexdigest()[:16]
