"""Token ids of many texts in two flat arrays: no Python list per text, on disk when there are too many for memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ranking.text import EncodedPair


class TokenStore:
    """n texts as one array of ids and n + 1 offsets; text i is ids[offsets[i]:offsets[i + 1]].

    document_starts: int32 [n], per text the index of the document's first token, as in ranking.text.EncodedPair; None
    where texts are not pairs of a query and a document.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, document_starts: np.ndarray | None = None):
        self.ids, self.offsets, self.document_starts = ids, offsets, document_starts
        self.lengths = np.diff(offsets)

    @classmethod
    def build(
        cls, texts: Iterable[Sequence[int] | np.ndarray], document_starts: Sequence[int] | np.ndarray | None = None
    ) -> TokenStore:
        """Collect texts in memory. ValueError if a text has no token, or document_starts are not one for each text."""
        pieces = [np.asarray(text, np.int32) for text in texts]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        if len(lengths) and not lengths.min():
            raise ValueError(f"text {int(lengths.argmin())} has no token")
        if document_starts is not None and len(document_starts) != len(pieces):
            raise ValueError(f"{len(document_starts)} document starts for {len(pieces)} texts")
        ids = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        return cls(ids, _offsets(lengths), None if document_starts is None else np.asarray(document_starts, np.int32))

    @classmethod
    def of_pairs(cls, pairs: Iterable[EncodedPair]) -> TokenStore:
        """Collect pairs in memory: 4 bytes a token, whatever the pairs' own lists take."""
        pieces: list[np.ndarray] = []
        document_starts: list[int] = []
        for pair in pairs:
            pieces.append(np.asarray(pair.ids, np.int32))
            document_starts.append(pair.document_start)
        return cls.build(pieces, document_starts)

    @classmethod
    def write(cls, folder: Path, pieces: Iterable[Sequence[EncodedPair]]) -> TokenStore:
        """Stream pieces of pairs to a file under folder and map it: memory is bounded by one piece.

        The offsets and document starts stay in memory: 12 bytes a pair.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lengths: list[np.ndarray] = []
        document_starts: list[np.ndarray] = []
        with (folder / "ids.int32").open("wb") as stream:
            for pairs in pieces:
                lengths.append(np.asarray([len(pair.ids) for pair in pairs], np.int64))
                document_starts.append(np.asarray([pair.document_start for pair in pairs], np.int32))
                for pair in pairs:
                    stream.write(np.asarray(pair.ids, np.int32).tobytes())
        offsets = _offsets(np.concatenate(lengths) if lengths else np.empty(0, np.int64))
        ids = np.memmap(folder / "ids.int32", np.int32, "r") if offsets[-1] else np.empty(0, np.int32)
        return cls(ids, offsets, np.concatenate(document_starts) if document_starts else np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> TokenStore:
        """A store in memory of the chosen texts (indices), in that order."""
        starts = None if self.document_starts is None else self.document_starts[rows]
        return TokenStore.build((self[row] for row in rows), starts)

    def pad(self, rows: Sequence[int], pad_id: int, token_types: bool = False) -> dict[str, Tensor]:
        """Model inputs of some rows, padded on the right to the longest: int64 [rows, longest] each.

        Two texts [5, 6, 2] and [7, 2] with pad_id 0 give
            input_ids      [[5, 6, 2], [7, 2, 0]]
            attention_mask [[1, 1, 1], [1, 1, 0]]
        and with token_types and document starts 1 and 1 also token_type_ids [[0, 1, 1], [0, 1, 0]].
        """
        lengths = self.lengths[rows]
        positions = np.arange(lengths.max())
        mask = positions < lengths[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = np.concatenate([self[row] for row in rows])
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if token_types:
            assert self.document_starts is not None, "token types need document starts"
            types = mask & (positions >= self.document_starts[rows][:, None])
            batch["token_type_ids"] = torch.from_numpy(types.astype(np.int64))
        return batch


def split_by_tokens(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices sorted by length, longest first, in pieces whose padded size (rows times longest) stays within budget.

    A text longer than the budget makes a piece of its own. Longest first, so that memory that does not suffice is
    found out at the first forward.
    """
    order = np.argsort(-lengths, kind="stable")
    pieces, start = [], 0
    while start < len(order):
        rows = max(1, budget // int(lengths[order[start]]))
        pieces.append(order[start : start + rows])
        start += rows
    return pieces


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
