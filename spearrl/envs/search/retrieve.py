"""Where documents come from: BM25 over a local corpus, or a retrieval server that speaks Search-R1's API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from spearrl.envs.search.files import Document, as_document, read_documents
from spearrl.envs.text.bm25 import LuceneIndex
from spearrl.errors import ConfigError

TRIES, PAUSE_S, LONGEST_REPLY = 3, 0.1, 8 << 20


class Unavailable(Exception):
    """The retrieval server gave no usable answer, and why."""


class CorpusIndex(NamedTuple):
    """An inverted index and its documents. Shared by all slots."""

    scorer: LuceneIndex
    documents: Sequence[Document]

    def search(self, query: str, k: int) -> list[Document]:
        """The best k documents that share a term with the query; of equal ones those that come first in the corpus."""
        return [self.documents[number] for number, _ in self.scorer.search(query, k)]


def build_index(documents: Iterable[Document]) -> CorpusIndex:
    """Index documents (title and text), by Lucene's English analysis. Raises ConfigError where there are none."""
    distinct = list(dict.fromkeys(documents))
    index = LuceneIndex.from_texts(f"{title} {text}" for title, text in distinct)
    if not index.vocabulary:
        hint = "give env.options.corpus, HotpotQA files with contexts, or a retriever_url"
        raise ConfigError("no documents to search in", where="env search", hint=hint)
    return CorpusIndex(index, distinct)


@lru_cache(maxsize=4)
def open_index(files: tuple[Path, ...]) -> CorpusIndex:
    """The index over what `files` hold, once per process."""
    return build_index(read_documents(files))


class RetrievalServer:
    """A retrieval server with Search-R1's API.

    POST {"queries", "topk", "return_scores"} is answered by {"result": [[{"document": {"contents"}, "score"}]]}.

    Args:
        timeout_s: seconds for a search, all tries together.
    """

    def __init__(self, url: str, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s
        # no connection is kept: the client has no end but the process's
        self._client = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))

    def search(self, query: str, k: int) -> list[Document]:
        """At most k documents, best first. Raises Unavailable."""
        request = {"queries": [query], "topk": k, "return_scores": True}
        end, reason = time.monotonic() + self.timeout_s, ""
        for attempt in range(TRIES):
            try:
                return _documents(self._post(request, end))[:k]
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RecursionError) as error:
                reason = str(error)[:200] or type(error).__name__
            pause = PAUSE_S * 4**attempt
            if time.monotonic() + pause >= end:
                break
            time.sleep(pause)
        raise Unavailable(reason)

    def _post(self, request: dict[str, Any], end: float) -> Any:
        left_s = max(end - time.monotonic(), 0.01)
        with self._client.stream("POST", self.url, json=request, timeout=left_s) as reply:
            reply.raise_for_status()
            body = b""
            for piece in reply.iter_bytes():  # a server that sends byte after byte is held to the end too
                body += piece
                if len(body) > LONGEST_REPLY or time.monotonic() > end:
                    raise ValueError(f"no end of the answer after {len(body)} bytes")
        return json.loads(body)


def _documents(answer: Any) -> list[Document]:
    """The documents in a server's answer to one query. Raises ValueError."""
    results = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(results, list) or not results or not isinstance(results[0], list):
        raise ValueError('the answer holds no {"result": [[…]]}')
    items = (item["document"] if isinstance(item, dict) and "document" in item else item for item in results[0])
    return [as_document(item) for item in items]
