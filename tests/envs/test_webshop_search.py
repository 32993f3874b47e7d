"""The native search engine against a real Lucene index: analysis, ranking, ties; and its behaviour on its own."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from spearrl.envs.text.analyzer import analyze, split_words, stem
from spearrl.envs.text.bm25 import LuceneIndex
from spearrl.envs.webshop.catalogue import indexed_text
from tests.support.shared_data import golden_lines, read_lines, shared


@pytest.fixture(scope="module")
def products() -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_lines(shared("data/webshop/products_1000_text.jsonl.xz"))]


@pytest.fixture(scope="module")
def term_vectors() -> dict[str, dict[str, int]]:
    vectors = {}
    for line in read_lines(shared("data/webshop/lucene_term_vectors_1k.tsv.gz")):
        asin, *pairs = line.split("\t")
        vectors[asin] = dict(zip(pairs[::2], map(int, pairs[1::2]), strict=True))
    return vectors


@pytest.fixture(scope="module")
def rankings() -> list[tuple[str, list[tuple[str, float]]]]:
    split = (line.split("\t") for line in golden_lines("webshop_search.tsv"))
    return [
        (query, [(item.split(":")[0], float(item.split(":")[1])) for item in ranking.split()])
        for query, ranking in split
    ]


def test_queries_are_analysed_as_lucene_does():
    for line in golden_lines("webshop_analyzer.tsv"):
        query, terms = line.split("\t")
        assert analyze(query) == terms.split(), query


def test_products_are_analysed_as_lucene_does(products, term_vectors):
    wrong = [p["asin"] for p in products if dict(Counter(analyze(p["contents"]))) != term_vectors[p["asin"]]]
    assert wrong == []


def test_the_indexed_text_is_the_originals(products):
    assert [p["asin"] for p in products if indexed_text(p) != p["contents"]] == []


@pytest.mark.parametrize("source", ["term vectors", "product texts"])
def test_rankings_equal_lucenes(source, products, term_vectors, rankings):
    products = sorted(products, key=lambda product: product["asin"])  # the order of Pyserini's equal scores
    asins = [p["asin"] for p in products]
    index = (
        LuceneIndex(term_vectors[a] for a in asins)
        if source == "term vectors"
        else LuceneIndex.from_texts(map(indexed_text, products))
    )
    for query, expected in rankings:
        ranking = index.search(query)
        assert [asins[number] for number, _ in ranking] == [asin for asin, _ in expected], query
        np.testing.assert_allclose([score for _, score in ranking], [score for _, score in expected], atol=2e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Frame Description:Solid, 7.8 inch 1,000 pcs", ["Frame", "Description:Solid", "7.8", "inch", "1,000", "pcs"]),
        ("it's o’clock 'quoted' end.", ["it's", "o’clock", "quoted", "end"]),
        ("snake_case __x__ ___ 46heel v2.0 2.x", ["snake_case", "__x__", "46heel", "v2.0", "2", "x"]),
        ('non-slip 28" x 28" a&b +5', ["non", "slip", "28", "x", "28", "a", "b", "5"]),
        ("锅巴 ひら カタカナ 일품 ไทย", ["锅", "巴", "ひ", "ら", "カタカナ", "일품", "ไทย"]),
        ("★ ☆ ™ ® → ½ °", ["★", "™", "®"]),
        ("❤️love 👨\u200d💼 👍🏽 🇩🇪🇫🇷 1️⃣ #️⃣", ["❤️", "love", "👨\u200d💼", "👍🏽", "🇩🇪", "🇫🇷", "1️⃣", "#️⃣"]),
        ("cafe\u0301 so\u00adft x\u200by", ["cafe\u0301", "so\u00adft", "x", "y"]),
        ("שב\"כ רב'", ['שב"כ', "רב'"]),
        ("", []),
    ],
)
def test_words_follow_unicode_word_breaks(text, expected):
    assert split_words(text) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("_" * 50_000 + "!", ""),
        ("\u200d" * 50_000, ""),
        ("a" + "_" * 50_000 + "!", "a" + "_" * 50_000),
        ("1a" * 25_000 + ".", "1a" * 25_000),
    ],
    ids=["_", "zwj", "a_", "1a"],
)
def test_degenerate_text_is_one_word_cut_into_pieces_or_none(text, word):
    pieces = split_words(text)
    assert "".join(pieces) == word and {len(piece) for piece in pieces[:-1]} <= {255}


def test_a_long_word_is_cut_as_lucene_does():
    assert [len(word) for word in split_words("x" * 600)] == [255, 255, 90]


STEMS = """
caresses=caress ponies=poni ties=ti cats=cat agreed=agre feed=feed plastered=plaster bled=bled motoring=motor
sing=sing hopping=hop falling=fall filing=file happy=happi sky=sky relational=relat conditional=condit valenci=valenc
vietnamization=vietnam analogousli=analog archaeology=archaeolog possibly=possibl triplicate=triplic hopefulness=hope
adjustment=adjust adoption=adopt replacement=replac controll=control roll=roll rate=rate cease=ceas as=as ion=ion
ing=ing
"""


@pytest.mark.parametrize("pair", [*STEMS.split(), "="])
def test_stems_are_porters(pair):
    word, expected = pair.split("=")
    assert stem(word) == expected


def test_possessives_and_stop_words_go():
    assert analyze("The women’s and MEN'S shoes will not be") == ["women", "men", "shoe"]


def test_equal_scores_follow_document_order():
    texts = ["red shoe", "blue shoe", "red shoe"]
    assert [number for number, _ in LuceneIndex.from_texts(texts).search("red shoe")] == [0, 2, 1]


def test_ties_at_the_cut_follow_the_same_rule():
    index = LuceneIndex.from_texts(["red"] * 20)
    assert [number for number, _ in index.search("red", k=3)] == [0, 1, 2]


def test_the_score_is_bm25():
    index = LuceneIndex([{"a": 2, "b": 1}, {"b": 3}, {}])
    idf = np.log(1 + (2 - 1 + 0.5) / (1 + 0.5))  # the empty document does not count
    expected = 2 * idf * 2 / (2 + 0.9 * (0.6 + 0.4 * 3 / 3))
    assert index.search(["a", "a"]) == [(0, pytest.approx(expected, rel=1e-6))]


def test_lengths_are_kept_in_one_byte():
    same = LuceneIndex(
        [{"a": 1, "b": 40}, {"a": 1, "b": 41}, {"a": 1, "b": 42}]
    )  # lengths 41, 42, 43: stored as 40, 42, 42
    scores = dict(same.search(["a"]))
    assert scores[0] > scores[1] == scores[2]


@pytest.mark.parametrize("query", ["", "the", "unknown", []])
def test_nothing_matches_nothing(query):
    assert LuceneIndex.from_texts(["a red shoe"]).search(query) == []


def test_an_index_of_nothing_finds_nothing():
    assert LuceneIndex.from_texts([]).search("red") == []
