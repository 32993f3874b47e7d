"""Search over files and servers: ranking, HotpotQA's and Search-R1's layouts, and a server that fails in every way."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import lzma
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spearrl.envs.pool import open_pool
from spearrl.envs.search import Search
from spearrl.envs.search import retrieve as retrieve_module
from spearrl.envs.search.answers import exact
from spearrl.envs.search.files import Document, read_documents, read_questions
from spearrl.envs.search.retrieve import RetrievalServer, Unavailable, build_index
from spearrl.envs.text.analyzer import analyze
from spearrl.envs.text.bm25 import K1, B
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Reply
from tests.support.shared_data import shared

WHALES = [
    Document("Blue whale", "The blue whale is the largest animal."),
    Document("Humpback", "Humpback whales sing; a whale song is long."),
    Document("Krill", "Krill are small crustaceans that whales eat."),
    Document("Beijing", "Beijing is the capital of China."),
]


def write(path: Path, records, lines: bool = True) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def hotpot(number: int, split: str = "train") -> dict:
    return {
        "_id": f"5a{number}",
        "question": f"What does animal {number} of {split} eat?",
        "answer": f"Krill {number}",
        "type": "bridge" if number % 2 else "comparison",
        "level": "hard",
        "supporting_facts": [[f"Animal {number}", 0]],
        "context": [
            [f"Animal {number}", [f"Animal {number} eats krill {number}.", " It swims."]],
            ["Krill", ["Krill are small."]],
        ],
    }


# ranking


def by_hand(query: str) -> list[float]:
    """Lucene's BM25 of each of WHALES, term by term."""
    bodies = [analyze(f"{d.title} {d.text}") for d in WHALES]
    mean, scores = sum(map(len, bodies)) / len(bodies), []
    for body in bodies:
        total = 0.0
        for term in analyze(query):
            holders = sum(term in other for other in bodies)
            idf = math.log(1 + (len(bodies) - holders + 0.5) / (holders + 0.5))
            total += idf * body.count(term) / (body.count(term) + K1 * (1 - B + B * len(body) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize(
    "query", ["whale", "blue whale song", "whales that eat krill", "capital whale", "small small animal"]
)
def test_ranking_is_bm25(query):
    scores = by_hand(query)
    wanted = [WHALES[i] for i in sorted(range(4), key=lambda i: (-scores[i], i)) if scores[i] > 0]
    index = build_index(WHALES)
    assert index.search(query, 10) == wanted and index.search(query, 2) == wanted[:2]


def test_equal_scores_keep_the_order_of_the_corpus():
    same = [Document(f"copy {letter}", "the same words") for letter in "abcdefghij"]
    assert build_index(same).search("words", 4) == same[:4]
    assert (
        build_index(WHALES).search("xyzzy", 3)
        == build_index(WHALES).search("", 3)
        == build_index(WHALES).search("the of", 3)
        == []
    )


def test_doubles_are_kept_once():
    assert build_index([*WHALES, *WHALES]).search("capital", 9) == [WHALES[3]]
    with pytest.raises(ConfigError, match="no documents"):
        build_index([])


# files


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.xz", "corpus.json"])
def test_layouts_of_documents(tmp_path, name):
    records = [
        {"id": "7", "contents": '"Blue whale"\nIt is large.\nVery.'},
        {"title": "Krill", "text": " small "},
        {"title": "Ice", "contents": "cold"},
    ]
    path = write(tmp_path / name, records, lines="jsonl" in name)
    assert list(read_documents([path])) == [
        Document("Blue whale", "It is large.\nVery."),
        Document("Krill", "small"),
        Document("Ice", "cold"),
    ]


def test_hotpotqa_gives_questions_and_documents(tmp_path):
    write(tmp_path / "hotpot_train_v1.1.json", [hotpot(n) for n in range(6)], lines=False)
    late = {
        **hotpot(9, "dev"),
        "context": {"title": ["Animal 9", "Krill"], "sentences": [["Animal 9 eats krill 9."], ["Krill are small."]]},
    }
    write(tmp_path / "hotpot_dev_distractor_v1.json", [late], lines=False)
    environment = Search(data=tmp_path)
    train, (val,) = environment.tasks("train"), environment.tasks("val")
    assert (
        [t.id for t in train] == [f"train-{n}" for n in range(6)]
        and val.id == "val-0"
        and environment.tasks("dev")[0].data == val.data
    )
    assert train[1].data == {
        "question": "What does animal 1 of train eat?",
        "answers": ["Krill 1"],
        "stratum": "bridge",
    }
    assert len(environment._retriever.documents) == 6 + 1 + 1  # krill once
    environment.reset(val, 0)
    assert environment.expert() is None
    shown = environment.step(Action("search animal 9")).observation.text
    assert shown.startswith('<information>Doc 1 (Title: "Animal 9") Animal 9 eats krill 9.\nDoc 2 (Title: ')
    assert environment.step(Action("answer krill 9.")).reward == 10.0


def test_a_single_file_is_divided_by_question(tmp_path):
    records = [{"question": f"q{n}?", "golden_answers": [str(n), f"no. {n}"], "data_source": "nq"} for n in range(200)]
    path, corpus = (
        write(tmp_path / "qa.jsonl", records),
        write(tmp_path / "corpus.jsonl", [d._asdict() for d in WHALES]),
    )
    environment = Search(corpus, data=str(path))
    questions = {split: {task.data["question"] for task in environment.tasks(split)} for split in ("train", "val")}
    assert (
        len(questions["train"]) + len(questions["val"]) == 200
        and not questions["train"] & questions["val"]
        and 8 < len(questions["val"]) < 35
    )
    fewer = read_questions.__wrapped__(str(write(tmp_path / "fewer.jsonl", records[:100])), "val")
    assert {task.data["question"] for task in fewer} == {q for q in questions["val"] if int(q[1:-1]) < 100}
    assert (
        environment.tasks("train")[0].data["answers"] == ["0", "no. 0"]
        or environment.tasks("val")[0].data["question"] == "q0?"
    )
    with pytest.raises(ConfigError, match="train and val"):
        environment.tasks("dev")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "q"}\n', "qa.jsonl:1: no question"),
        ('{"question": "q", "answer": "a"}\n{oops\n', "qa.jsonl:2: "),
        ('{"question": 1, "answer": "a"}', "qa.jsonl:1: "),
        ("[3]", "qa.jsonl:1: "),
    ],
)
def test_broken_questions_are_named(tmp_path, text, said):
    (tmp_path / "qa.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=f"{said}(.|\n)*golden_answers|{said}(.|\n)*JSON lines"):
        read_questions(str(tmp_path / "qa.jsonl"), "train")


ANSWERS = [
    ({"answer": "NYC", "answer_aliases": ["New York", "NYC"]}, ["NYC", "New York"]),  # MuSiQue
    ({"answer": {"value": "NYC", "aliases": ["New York"], "type": "WikipediaEntity"}}, ["NYC", "New York"]),  # TriviaQA
    ({"answers": {"text": ["NYC", "NYC"], "answer_start": [3, 9]}}, ["NYC"]),  # SQuAD
    ({"answer": 1969}, ["1969"]),
    ({"golden_answers": None, "answer": "NYC"}, ["NYC"]),
    ({"reward_model": {"style": "rule", "ground_truth": {"target": ["NYC", "New York"]}}}, ["NYC", "New York"]),  # verl
]


@pytest.mark.parametrize(("fields", "answers"), ANSWERS)
def test_answers_of_every_usual_layout(tmp_path, fields, answers):
    path = write(tmp_path / "qa.jsonl", [{"question": "Where?", **fields}])
    assert [task.data["answers"] for task in read_questions(str(path), "val")] == [answers]


def test_parquet_questions_and_verls_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    row = {
        "prompt": [{"role": "user", "content": "Rules. Question: Where?"}],
        "reward_model": {"ground_truth": {"target": ["NYC"]}},
        "extra_info": {"question": "Where?"},
        "data_source": "nq",
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    (task,) = read_questions(str(tmp_path), "train")
    assert task.data == {"question": "Where?", "answers": ["NYC"], "stratum": "nq"}


def test_questions_without_an_answer_are_left_out_and_told(tmp_path):
    rows = [
        {"question": "a?", "answers": {"text": [], "answer_start": []}},  # SQuAD 2
        {"question": "b?", "answer": "x", "answerable": False},  # MuSiQue
        {"question": "c?", "answer": None},
        {"question": "d?", "answer": "x"},
    ]
    path = write(tmp_path / "qa.jsonl", rows)
    with pytest.warns(UserWarning, match=r"search data: 1 questions in .*qa.jsonl; 3 without an answer left out"):
        (task,) = read_questions(str(path), "val")
    assert task.data["question"] == "d?"


@pytest.mark.parametrize("count", [2, 8, 40])
def test_a_small_file_still_holds_one_out(tmp_path, count):
    questions = (f"What is {n}?" for n in itertools.count())
    records = list(itertools.islice(({"question": q, "answer": "x"} for q in questions if derive(q) % 10), count))
    path = str(write(tmp_path / "qa.jsonl", records))  # the hash alone would hold none of these out
    assert (len(read_questions(path, "val")), len(read_questions(path, "train"))) == (1, count - 1)


def test_articles_and_punctuation_alone_are_compared_as_they_are(tmp_path):
    """Golds of HotpotQA: a band, and an album. By SQuAD's rule any answer of such words would be right."""
    assert exact("the the.", ["The The"]) and not exact("a", ["The The"]) and not exact("?", ["The The"])
    assert exact("!!!", ["!!!"]) and not exact("the", ["!!!"]) and not exact("...", ["!!!"])


@pytest.mark.parametrize("empty", [None, ""])
def test_a_document_whose_text_is_empty_shows_its_contents(tmp_path, empty):
    path = write(tmp_path / "corpus.jsonl", [{"text": empty, "contents": '"Krill"\nsmall'}])
    assert list(read_documents([path])) == [Document("Krill", "small")]


def test_files_that_do_not_fit_are_refused(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="no .json, .jsonl or .parquet files"):
            Search(data=path)
    qa = write(tmp_path / "train.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(ConfigError, match="need env.options.corpus or env.options.retriever_url"):
        Search(data=qa)
    write(tmp_path / "train_more.jsonl", [{"question": "q", "answer": "a"}])
    environment = Search(data=tmp_path, retriever_url="http://localhost:1")
    with pytest.raises(ConfigError, match="2 files of the split 'train'"):
        environment.tasks("train")
    with pytest.raises(ConfigError, match="0 files of the split 'val'"):
        environment.tasks("val")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match="bad.jsonl.gz"):
        read_questions(str(tmp_path / "bad.jsonl.gz"), "train")


def test_hotpotqa_questions_without_contexts():
    path = shared("data/other/hotpotqa_dev_qa_only.jsonl.xz")
    environment = Search(data=path, retriever_url="http://localhost:1/retrieve")
    train, val = environment.tasks("train"), environment.tasks("val")
    assert len(train) + len(val) == 7405 and {t.data["stratum"] for t in train} == {"bridge", "comparison"}


# a retrieval server


class Peer:
    """A local server of Search-R1's API; `answers` are played in turn, the last one for ever."""

    def __init__(self, *answers):
        self.requests, self.released = [], threading.Event()
        peer, left = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                peer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = left.pop(0) if len(left) > 1 else left[0]
                try:
                    answer(self)
                except OSError:  # the client has gone
                    peer.released.set()

            def log_message(self, *args):
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/retrieve"
        self.server.peer = self
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def reply(body, status: int = 200):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def silent(handler):
    handler.server.peer.released.wait(30)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.peer.released.wait(0.01):
        handler.wfile.write(b" ")


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(64):
        handler.wfile.write(b" " * (1 << 20))


FOUND = {
    "result": [
        [
            {"document": {"id": "1", "contents": '"Blue whale"\nIt is large.'}, "score": 9.1},
            {"document": {"title": "Krill", "text": "small"}, "score": 2},
        ]
    ]
}
GOOD = reply(FOUND)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr(retrieve_module, "PAUSE_S", 0.001)
    made = []
    yield lambda *answers: made.append(Peer(*answers)) or made[-1]
    for peer in made:
        peer.close()


def open_search(tmp_path, url: str, **options) -> Search:
    data = write(
        tmp_path / "qa.jsonl", [{"question": f"How large is whale {n}?", "answer": "large"} for n in range(30)]
    )
    return Search(data=data, retriever_url=url, **options)


def test_a_server_is_asked_as_search_r1_does(tmp_path, peers):
    peer = peers(GOOD)
    environment = open_search(tmp_path, peer.url, topk=1)
    environment.reset(environment.tasks("train")[0], 0)
    outcome = environment.step(Action("search blue whale"))
    assert peer.requests == [{"queries": ["blue whale"], "topk": 1, "return_scores": True}]
    assert (
        outcome.observation.text == '<information>Doc 1 (Title: "Blue whale") It is large.</information>'
        and "fault" not in outcome.info
    )
    assert (environment.execution, environment._world) == ("thread", None)


def test_documents_without_scores_are_read_too(peers):
    assert RetrievalServer(peers(reply({"result": [[{"contents": '"A"\nb'}]]})).url, 5).search("x", 3) == [
        Document("A", "b")
    ]


@pytest.mark.parametrize(
    "bad",
    [
        reply(b"", 500),
        reply(b"oops"),
        reply({"result": 7}),
        reply({"result": [[{"document": 3}]]}),
        reply([]),
        reply(b"[" * 10**5),
    ],
)
def test_a_server_is_asked_three_times(tmp_path, peers, bad):
    peer = peers(bad, bad, GOOD)
    environment = open_search(tmp_path, peer.url)
    environment.reset(environment.tasks("train")[0], 0)
    assert "fault" not in environment.step(Action("search x")).info and len(peer.requests) == 3
    lost = peers(bad)
    environment = open_search(tmp_path, lost.url)
    environment.reset(environment.tasks("train")[0], 0)
    outcome = environment.step(Action("search x"))
    assert outcome.info == {"success": False, "em": 0.0, "f1": 0.0, "fault": True} and len(lost.requests) == 3
    assert "The search engine did not answer: " in outcome.observation.text and (
        outcome.reward,
        outcome.terminated,
    ) == (0.0, False)


@pytest.mark.parametrize("bad", [silent, drip, endless])
def test_a_server_that_keeps_us_waiting_is_left(peers, bad):
    peer, begun = peers(bad), time.monotonic()
    with pytest.raises(Unavailable):
        RetrievalServer(peer.url, 0.5).search("x", 3)
    assert time.monotonic() - begun < 10
    assert bad is silent or peer.released.wait(10)  # it was hung up on


def test_a_closed_port_is_a_fault(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = open_search(tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}/retrieve")
    environment.reset(environment.tasks("train")[0], 0)
    outcome = environment.step(Action("search x"))
    assert outcome.info["fault"] is True and "refused" in outcome.observation.text


def test_many_slots_ask_at_once(tmp_path, peers):
    together = threading.Barrier(6)

    def meet(handler):
        together.wait(20)
        GOOD(handler)

    environment = open_search(tmp_path, peers(meet).url)
    pool = open_pool(environment, style="chat", workers=6, deadline_s=30)

    async def play(number: int):
        slot = pool.acquire()
        await pool.start(slot, environment.tasks("train")[number], 0)
        return await pool.act(slot, Reply("<think>so</think><search>whale</search>", (), "stop"), False)

    async def play_all():
        return await asyncio.gather(*(play(n) for n in range(6)))

    try:
        played = asyncio.run(play_all())
    finally:
        pool.close()
    assert all(
        "Blue whale" in p.outcome.observation.text and p.messages[0].text == p.outcome.observation.text for p in played
    )
