"""BM25 over an inverted index, with Lucene's arithmetic (single precision, one-byte lengths), ties and so rankings."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from spearrl.envs.text.analyzer import analyze

K1, B = np.float32(0.9), np.float32(0.4)  # Pyserini's defaults, and so Search-R1's
EXACT_LENGTHS = 24  # SmallFloat stores lengths exactly up to here, the rest above it with 4 significant bits


class LuceneIndex:
    """An inverted index: for each term the documents that hold it and what one query occurrence is worth there.

    Args:
        documents: term counts of each document.
    """

    def __init__(self, documents: Iterable[Mapping[str, int]]):
        vocabulary: dict[str, int] = {}
        terms, counts, sizes = array("i"), array("i"), array("i")
        for document in documents:
            terms.extend(vocabulary.setdefault(term, len(vocabulary)) for term in document)
            counts.extend(document.values())
            sizes.append(len(document))
        self.vocabulary = vocabulary
        self.size = len(sizes)
        document_of = np.repeat(np.arange(self.size, dtype=np.int32), np.asarray(sizes))
        term_of, count_of = np.asarray(terms), np.asarray(counts)
        lengths = np.bincount(document_of, weights=count_of, minlength=self.size).astype(np.int64)
        norms = _norms(lengths)
        order = np.argsort(term_of, kind="stable")
        self.documents: NDArray[np.int32] = document_of[order]
        frequency = count_of[order].astype(np.float32)
        self.impacts: NDArray[np.float32] = frequency / (frequency + norms[self.documents])
        in_documents = np.bincount(term_of, minlength=len(vocabulary))
        self.offsets: NDArray[np.int64] = np.concatenate(([0], np.cumsum(in_documents)))
        filled = int((lengths > 0).sum())
        odds = (filled - in_documents + 0.5) / (in_documents + 0.5)
        self.idf: NDArray[np.float32] = np.log1p(odds).astype(np.float32)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> LuceneIndex:
        """An index over plain texts."""
        return cls(Counter(analyze(text)) for text in texts)

    def search(self, query: str | Iterable[str], k: int = 50) -> list[tuple[int, float]]:
        """The best k documents that hold a term of the query, (document number, score), best first, then by number.

        score = Σ_t n_t · ln(1 + (N − df_t + ½) / (df_t + ½)) · tf / (tf + k1·(1 − b + b·length/mean length))

        Args:
            query: a text to analyse, or terms already analysed.
        """
        scores = np.zeros(self.size)
        for term, count in Counter(analyze(query) if isinstance(query, str) else query).items():
            number = self.vocabulary.get(term)
            if number is None:
                continue
            part = slice(self.offsets[number], self.offsets[number + 1])
            # as in Lucene, shares are rounded to single precision and their sum is kept in double: ties depend on it
            scores[self.documents[part]] += self.impacts[part] * (np.float32(count) * self.idf[number])
        single = scores.astype(np.float32)
        hits = np.flatnonzero(single)
        if len(hits) > k > 0:  # only the best are sorted
            hits = hits[single[hits] >= np.partition(single[hits], -k)[-k]]
        best = hits[np.argsort(-single[hits], kind="stable")][:k]
        return list(zip(best.tolist(), single[best].tolist(), strict=True))


def _norms(lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """k1·(1 − b + b·length/mean length) per document, with the length as Lucene's one byte keeps it."""
    filled = max(int((lengths > 0).sum()), 1)
    mean = np.float32(max(lengths.sum() / filled, 1.0))
    above = np.maximum(lengths - EXACT_LENGTHS, 0)
    shift = np.maximum(np.frexp(above.astype(np.float64))[1] - 4, 0)
    stored = np.where(lengths < EXACT_LENGTHS, lengths, EXACT_LENGTHS + (above >> shift << shift)).astype(np.float32)
    return K1 * ((np.float32(1) - B) + B * stored / mean)
