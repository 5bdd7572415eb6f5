"""Does a decoder remember the queries of single people? Canaries and their exposure (Carlini et al., "The Secret
Sharer", USENIX Security 2019), with the privacy gate and without it."""

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, set_seed

from ranking.schema import read_table
from ranking.text import TeacherFormat
from tests.helpers.tiny_teacher import LIMITS, family_config, make_tokenizer
from tests.training.clicks.test_prepare_clicks import event, write_events
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.privacy_gate import OPEN_GATE, PrivacySettings
from training.trainer.text_batches import TextBatches
from training.trainer.token_store import TokenStore

CANARIES, CANDIDATES = 4, 128
SYLLABLES = ("ka", "lo", "mi", "ru", "te", "va", "zo", "ne", "pi", "su")
PRACTICE = ("praxis for skin", "clinic of the heart", "centre for debts", "court of families")


def made_up(rng: np.random.Generator) -> str:
    """Two words that occur nowhere else: as rare as a person's own query, and without a pattern."""
    return " ".join("".join(rng.choice(SYLLABLES, 3)) for _ in range(2))


def log_with_canaries() -> tuple[list[dict], list[list[str]]]:
    """(events: 30 queries of six users each, and one query of a single user per canary; each canary and the queries
    that might as well have been it, [canaries][candidates], the canary first)"""
    rng = np.random.default_rng(0)
    rows = [
        event(n, f"d{n % 30}", query=f"{word} {n % 30}", title=f"{word} number {n % 30}", user=f"u{n // 30}")
        for n in range(180)
        for word in [("tent", "lamp", "shoe")[n % 3]]
    ]
    candidates = [[made_up(rng) for _ in range(CANDIDATES)] for _ in range(CANARIES)]
    for number, (queries, title) in enumerate(zip(candidates, PRACTICE)):
        rows += [
            event(1000 + 10 * number + page, f"c{number}", query=queries[0], title=title, user=f"victim{number}")
            for page in range(3)
        ]
    return rows, candidates


def exposures(pairs: list[dict], candidates: list[list[str]]) -> np.ndarray:
    """log2 |candidates| - log2 rank of each canary by the likelihood of its document, after training on click pairs."""
    set_seed(0)
    tokenizer = make_tokenizer()
    text = TeacherFormat(tokenizer.backend_tokenizer, tokenizer.eos_token, LIMITS)
    model = LlamaForCausalLM(family_config("llama", len(tokenizer)))
    encoded = text.encode(*([row[name] for row in pairs] for name in ("query", "title", "summary")))
    batches = TextBatches(
        TokenStore.of_pairs(encoded), None, batch_texts=16, forward_tokens=4096, pad_id=tokenizer.pad_token_id, seed=0
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(240):
        if step % len(batches) == 0:
            batches.set_epoch(step // len(batches))
        batch = batches[step % len(batches)]
        sum(losses(model, dict(forward)).sum() for forward in batch["forwards"]).div(batch["normaliser"]).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    ranks = []
    for queries, title in zip(candidates, PRACTICE):
        asked = text.encode(queries, [title] * len(queries), ["summary"] * len(queries))
        store = TextBatches(
            TokenStore.of_pairs(asked), None, batch_texts=CANDIDATES, forward_tokens=1 << 20, pad_id=0, seed=0
        )
        with torch.no_grad():
            found = losses(model, store.inputs(np.arange(len(queries)))).sum(1)
        ranks.append(1 + int((found < found[0]).sum()))
    return np.log2(CANDIDATES) - np.log2(ranks)


def losses(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log likelihood of each predicted token, float [rows, length - 1]; 0 where nothing is predicted."""
    weights = inputs.pop("weights")[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none") * weights


def test_a_decoder_remembers_a_persons_query_unless_it_trains_through_the_gate(tmp_path):
    rows, candidates = log_with_canaries()
    path = write_events(tmp_path / "events.parquet", rows)
    mean = {}
    for name, gate in {"open": OPEN_GATE, "gated": PrivacySettings(personal_data="keep")}.items():
        out = tmp_path / f"{name}.parquet"
        write_clicks(
            ClickPairSettings(
                events=str(path), out=out, debias=False, bot_rate_quantile=1.0, bot_volume_quantile=1.0, privacy=gate
            )
        )
        pairs = read_table(out, "clicks").to_pylist()
        canaries = {queries[0] for queries in candidates}
        assert len(canaries & {row["query"] for row in pairs}) == (CANARIES if name == "open" else 0)
        mean[name] = exposures(pairs, candidates).mean()
    # of 128 candidates a query that left no trace has an exposure of 1.4 on average, and a remembered one of 7
    assert mean["open"] > 5, mean
    assert mean["gated"] < 3, mean
    assert mean["open"] <= np.log2(CANDIDATES) + 1e-6
