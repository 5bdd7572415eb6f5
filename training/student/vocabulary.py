"""A WordPiece vocabulary trained on a dataset folder, for students that start from scratch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFC, NFD, BertNormalizer, Replace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import BertPreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from ranking.errors import InputError
from ranking.schema import iter_table
from ranking.text import normalise

LOGGER = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# letters of Thai, Lao, Burmese and Khmer with their marks; Chinese characters are split off by BertNormalizer
_UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]\\p{M}*"
MAX_TEXTS = 2_000_000  # the vocabulary of a larger set hardly differs, and the trainer counts words in memory


def train_wordpiece(data: str | Path, out: str | Path, vocabulary_size: int) -> Path:
    """Write the BERT tokenizer (lower-cased WordPiece) of a dataset's queries and documents to `out` and return it.

    Texts come from candidates, clicks and train judgments, whichever are there; the vocabulary needs no labels.
    InputError if the folder has none of them.
    """
    sources = [(Path(data) / f"{name}.parquet", name) for name in ("candidates", "clicks")]
    sources.append((Path(data) / "judgments" / "train.parquet", "judgments"))
    present = [(path, table) for path, table in sources if path.is_file()]
    if not Path(data).is_dir():
        raise InputError(f"{data}: no such folder; a dataset folder that training.prepare_data wrote is needed")
    if not present:
        raise InputError(f"{data}: no candidates, clicks or train judgments to take a vocabulary from")
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    # BERT strips every mark, which takes the vowels out of Thai and Hindi: here accents alone, as of Latin or Greek
    accents = [NFD(), Replace(Regex("[\u0300-\u036f]"), ""), NFC()]
    tokenizer.normalizer = NormalizerSequence([BertNormalizer(lowercase=True, strip_accents=False), *accents])
    # a Thai sentence is one "word" to BERT's splitter, and one longer than 100 characters would be unknown as a whole
    tokenizer.pre_tokenizer = PreTokenizerSequence([Split(Regex(_UNSPACED), "isolated"), BertPreTokenizer()])
    tokenizer.decoder = WordPieceDecoder()
    tokenizer = train_repeatably(tokenizer, lambda: _distinct_texts(present), vocabulary_size)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name[1:-1].lower()}_token": name for name in SPECIAL_TOKENS},
    ).save_pretrained(out)
    LOGGER.info("trained a WordPiece vocabulary of %d tokens on %s", tokenizer.get_vocab_size(), data)
    return Path(out)


def train_repeatably(tokenizer: Tokenizer, texts: Callable[[], Iterable[str]], vocabulary_size: int) -> Tokenizer:
    """A copy of a tokenizer with a WordPiece model that is the same whenever it is trained on the same texts.

    The trainer alone numbers the letters inside words ("##a") as it meets them in a hash table that each process orders
    anew, and breaks ties between merges by these numbers: a checkpoint of one seed could not be trained twice.

    texts: called twice. tokenizer: its normalizer, pre-tokenizer and decoder are the copy's.
    """
    inside: set[str] = set()
    for text in texts():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            inside.update(word[1:])
    # what is given as special is numbered first, in this order
    first = [*SPECIAL_TOKENS, *(f"##{letter}" for letter in sorted(inside))]
    trainer = WordPieceTrainer(vocab_size=vocabulary_size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    trained = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    if tokenizer.decoder is not None:
        trained.decoder = tokenizer.decoder
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    return trained


def _distinct_texts(sources: list[tuple[Path, str]]) -> Iterator[str]:
    """Queries, titles and summaries, each text once: a document is a candidate of many queries."""
    seen: set[int] = set()
    for path, table in sources:
        for rows in iter_table(path, table):
            for column in ("query", "title", "summary"):
                for text in rows.column(column).to_pylist():
                    if hash(text) in seen:
                        continue
                    if len(seen) == MAX_TEXTS:
                        LOGGER.warning("the vocabulary is taken from the first %d distinct texts", MAX_TEXTS)
                        return
                    seen.add(hash(text))
                    yield normalise(text)
