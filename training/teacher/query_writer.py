"""A decoder that writes queries for a document: samples them, and says how likely a query is for a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from ranking.text import QueryWriterFormat
from training.teacher.decoder import open_decoder, open_tokenizer
from training.teacher.likelihood import log_likelihood
from training.trainer.token_store import TokenStore
from training.trainer.training_settings import bf16_is_native


class QueryWriter:
    """A checkpoint of `pretrain_teacher --direction document-to-query`, ready to sample from.

    InputError if the folder holds no such checkpoint.
    """

    def __init__(self, folder: Path):
        self.text_format = QueryWriterFormat.of_checkpoint(folder)
        self.tokenizer, self.decoder = open_tokenizer(folder), open_decoder(folder)
        self.device = PartialState(cpu=not torch.accelerator.is_available()).device
        self.decoder.to(self.device).eval()
        self.bf16 = bf16_is_native()

    @torch.inference_mode()
    def write(
        self, titles: Sequence[str], summaries: Sequence[str], *, each: int, temperature: float, top_p: float, seed: int
    ) -> list[list[str]]:
        """`each` queries of every document, drawn token by token; equal for the same seed and the same documents.

        A query is cut at the limit of the checkpoint's card; it may be empty, or one that was drawn before.
        """
        prompts = self.text_format.prompts(titles, summaries)
        longest = max(map(len, prompts), default=0)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), longest), pad)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask = torch.arange(longest) >= torch.tensor([[longest - len(prompt)] for prompt in prompts])
        torch.manual_seed(seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            drawn: Any = self.decoder.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.long().to(self.device),
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                num_return_sequences=each,
                max_new_tokens=self.text_format.limits.max_query_tokens + 1,
                eos_token_id=self.text_format.eos_id,
                pad_token_id=pad,
            )
        texts = self.tokenizer.batch_decode(drawn[:, longest:], skip_special_tokens=True)
        return [texts[start : start + each] for start in range(0, len(texts), each)]

    def likelihoods(
        self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str], forward_tokens: int
    ) -> NDArray[np.float32]:
        """float32 [pairs]: log p(query | document) in nats."""
        texts = TokenStore.of_pairs(self.text_format.encode(queries, titles, summaries))
        pad = self.tokenizer.pad_token_id
        return log_likelihood(self.decoder, texts, pad, bf16=self.bf16, forward_tokens=forward_tokens)
