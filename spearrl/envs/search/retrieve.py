"""Where documents come from: BM25 over a local corpus (bm25s), or a retrieval server that speaks Search-R1's API."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spearrl.envs.search.files import Document, document, documents
from spearrl.envs.text.analyzer import analyze
from spearrl.errors import ConfigError

K1, B = 0.9, 0.4  # Pyserini's, and so Search-R1's
TRIES, PAUSE_S, LONGEST_REPLY = 3, 0.1, 8 << 20


class Unavailable(Exception):
    """The retrieval server gave no usable answer, and why."""


class Index(NamedTuple):
    """An inverted index (bm25s) and its documents. Shared by all slots."""

    scorer: Any
    documents: Sequence[Document]

    def search(self, query: str, k: int) -> list[Document]:
        """The best k documents that share a term with the query; of equal ones those that come first in the corpus."""
        terms = self.scorer.get_tokens_ids(analyze(query))
        if not terms:
            return []
        scores = self.scorer.get_scores_from_ids(terms)
        hits = np.flatnonzero(scores > 0)
        if len(hits) > k:
            hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
        best = hits[np.lexsort((hits, -scores[hits]))][:k]
        return [self.documents[place] for place in best]


def build(found: Iterable[Document]) -> Index:
    """Index documents: title and text, by Lucene's English analysis. Raises ConfigError without documents, or without bm25s."""
    library, vocabulary = _bm25s(), dict[str, int]()
    kept = list(dict.fromkeys(found))
    ids = [
        [vocabulary.setdefault(term, len(vocabulary)) for term in analyze(f"{title} {text}")] for title, text in kept
    ]
    if not vocabulary:
        raise ConfigError(
            "no documents to search in",
            where="env search",
            hint="give env.options.corpus, HotpotQA files with contexts, or a retriever_url",
        )
    scorer = library.BM25(k1=K1, b=B, method="lucene")
    scorer.index((ids, vocabulary), show_progress=False)
    return Index(scorer, kept)


@lru_cache(maxsize=4)
def open_index(files: tuple[Path, ...]) -> Index:
    """The index over what `files` hold, once per process."""
    return build(documents(files))


class Server:
    """A retrieval server: POST {"queries", "topk", "return_scores"}, answered by {"result": [[{"document": {"contents"}, "score"}]]}.

    Args:
        timeout_s: seconds for a search, all tries together.
    """

    def __init__(self, url: str, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s

    def search(self, query: str, k: int) -> list[Document]:
        """At most k documents, best first. Raises Unavailable."""
        body = json.dumps({"queries": [query], "topk": k, "return_scores": True}).encode()
        end, reason = time.monotonic() + self.timeout_s, ""
        for attempt in range(TRIES):
            try:
                return _documents(self._post(body, end))[:k]
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                reason = str(error)[:200] or type(error).__name__
            pause = PAUSE_S * 4**attempt
            if time.monotonic() + pause >= end:
                break
            time.sleep(pause)
        raise Unavailable(reason)

    def _post(self, body: bytes, end: float) -> Any:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=max(end - time.monotonic(), 0.01)) as reply:
            pieces, size = [], 0
            while piece := reply.read1(1 << 16):  # a server that sends byte after byte is held to the end too
                pieces.append(piece)
                size += len(piece)
                if size > LONGEST_REPLY or time.monotonic() > end:
                    raise ValueError(f"no end of the answer after {size} bytes")
        return json.loads(b"".join(pieces))


def _documents(answer: Any) -> list[Document]:
    """The documents in a server's answer to one query. Raises ValueError."""
    found = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not found or not isinstance(found[0], list):
        raise ValueError('the answer holds no {"result": [[…]]}')
    return [document(item["document"] if isinstance(item, dict) and "document" in item else item) for item in found[0]]


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ConfigError(
            "a local corpus needs bm25s", where="env search", hint='pip install "spearrl[envs]"'
        ) from error
    return bm25s
