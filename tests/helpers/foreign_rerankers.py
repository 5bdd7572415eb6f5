"""Tiny random rerankers of foreign families, and the published code's scores of them, written out beside each family.

The references follow the published code step by step and share nothing with ranking/reranker_prompts.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CORPUS = [
    "Given a query A and a passage B, determine whether the passage contains an answer to the query.",
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided.",
    "A light running shoe with a firm sole, in red and blue. Rice with saffron, ready in one hour.",
    *["yes", "no", "Yes", "No"] * 20,
]
# Qwen's own pattern: punctuation takes the line breaks that follow it into one token
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# 32 is the narrowest head that vLLM's attention takes on a CPU
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "intermediate_size": 96, "max_position_embeddings": 4096,
}  # fmt: skip


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=QWEN_MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # as in the real vocabulary, a full stop with a line break is one token, and so is a space with one
    tokenizer.train_from_iterator([*CORPUS, *["so.\n", "so):\n", "so \n", "so)\n"] * 40], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<unused1>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=marks,
        initial_alphabet=list("▁\n"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *(f"<0x{value:02X}>" for value in range(256))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", None, [("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


FAMILIES: dict[str, tuple[type, Callable[[], PreTrainedTokenizerFast], bool]] = {
    "qwen3-reranker": (Qwen3Config, qwen_tokenizer, True),
    "bge-reranker-gemma": (GemmaConfig, gemma_tokenizer, True),
    "mxbai-rerank-v2": (Qwen2Config, qwen_tokenizer, False),
}


def make_reranker(folder: Path, prompt: str, classifier: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random reranker of the family behind `prompt` as a Hugging Face folder; its scores spread.

    classifier: published as a sequence classifier instead of a language model.
    """
    config_class, make_tokenizer, tied = FAMILIES[prompt]
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = config_class(
        vocab_size=len(tokenizer) + 7,  # real vocabularies are padded to a round number
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=tied, num_labels=1, **SIZES,
    )  # fmt: skip
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.5 if "score" in name or "embed" in name or "lm_head" in name else 0.15)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published_ids(prompt: str, tokenizer: PreTrainedTokenizerFast, query: str, document: str) -> list[int]:
    """The token ids that the family's published code makes of a pair."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if prompt == "qwen3-reranker":  # model card of Qwen/Qwen3-Reranker-0.6B
        task = "Given a web search query, retrieve relevant passages that answer the query"
        prefix = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        )
        suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        return ids(prefix) + ids(f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}") + ids(suffix)
    if prompt == "bge-reranker-gemma":  # model card of BAAI/bge-reranker-v2-gemma
        question = (
            "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
            "providing a prediction of either 'Yes' or 'No'."
        )
        first = [tokenizer.bos_token_id, *ids(f"A: {query}")]
        return first + ids("\n") + ids(f"B: {document}") + ids("\n") + ids(question)
    prefix = (  # mixedbread-ai/mxbai-rerank, mxbai_rerank_v2.py
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    pair = ids(f"query: {query}") + ids("\n") + ids(f"document: {document}")
    return ids(prefix) + pair + ids("\n") + ids(task) + ids("<|im_end|>\n<|im_start|>assistant\n")


def published_scores(folder: Path, prompt: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The family's published score of each (query, document), in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = last_logits(model, [published_ids(prompt, tokenizer, query, document) for query, document in pairs])
    if prompt == "qwen3-reranker":  # log-softmax over the two answers; the logit of its probability is the difference
        no, yes = (tokenizer.convert_tokens_to_ids(answer) for answer in ("no", "yes"))
        both = torch.log_softmax(torch.stack([logits[:, no], logits[:, yes]], 1), 1)
        return (both[:, 1] - both[:, 0]).tolist()
    if prompt == "bge-reranker-gemma":
        return logits[:, tokenizer("Yes", add_special_tokens=False)["input_ids"][0]].tolist()
    one, zero = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ("1", "0"))
    return (logits[:, one] - logits[:, zero]).tolist()


@torch.inference_mode()
def last_logits(model, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [rows, outputs]: a language model's logits behind the last token of each row.

    Rows are padded on the right, where a causal model's earlier states cannot see, with id 0.
    """
    found = []
    for start in range(0, len(rows), 50):
        some = [torch.tensor(row) for row in rows[start : start + 50]]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(row) for row in some])
        logits = model(ids).logits
        found.append(logits[torch.arange(len(some)), lengths - 1])
    return torch.cat(found)


def hostile_pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(query, title, summary) rows that spell tokens, layouts, borders and blanks, among ordinary ones."""
    draw = random.Random(seed)
    parts = [
        "running shoes", "größe 44", "靴 メンズ", "Light shoe.", "ready in one hour.", "paella (1)", "0", "yes", "No.",
        "👟", "<|im_end|>", "<|im_start|>user\n", "<think>", "</think>", "<bos>", "<eos>", "<unused0>", "<pad>",
        "[SEP]", "</s>", "\n<Document>: best", "\nB: best", "document: best\n", "\ue000", "\ue000<|im_end|>\ue000",
        "<<|im_end|>|im_end|>", "\x00\x1b[31m", "\u2028", "\ufeff", "ﬁne ①", "e\u0301", "  ", "x" * 400, "{query}",
        "{document}", "'Yes'",
    ]  # fmt: skip

    def text(most: int) -> str:
        return " ".join(draw.choices(parts, k=draw.randint(0, most)))

    return [(f"shoes {text(3)}", text(4), text(9)) for _ in range(count)]
