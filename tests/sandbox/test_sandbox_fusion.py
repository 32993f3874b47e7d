"""The client of SandboxFusion against a local server that speaks its API, well and badly."""

from __future__ import annotations

import io
import json
import threading
from contextlib import redirect_stderr, redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from spearrl.errors import ConfigError
from spearrl.sandbox import SandboxOptions, open_sandbox
from spearrl.sandbox import fusion_client as fusion


def honest(body: dict) -> dict:
    """What SandboxFusion answers; the code is this file's own, so it may run here."""
    out, err = io.StringIO(), io.StringIO()
    status, code = "Finished", 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            exec(body["code"], {"stdin": body["stdin"]})
    except TimeoutError:
        status, code = "TimeLimitExceeded", None
    except Exception as error:
        err.write(f"Traceback (most recent call last):\n{type(error).__name__}: {error}\n")
        code = 1
    run = {
        "status": status,
        "execution_time": 0.25,
        "return_code": code,
        "stdout": out.getvalue(),
        "stderr": err.getvalue(),
    }
    outcome = "Success" if code == 0 else "Failed"
    return {
        "status": outcome,
        "message": "",
        "compile_result": None,
        "run_result": run,
        "executor_pod_name": None,
        "files": {},
    }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append((self.path, body))
        answer = server.script.pop(0) if server.script else honest
        if callable(answer):
            answer = (200, json.dumps(answer(body)).encode())
        code, data = answer
        with suppress(ConnectionError):  # a client that left
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *words):
        """Quiet."""


@pytest.fixture
def server():
    """A server: `script` holds its answers to come, (status, bytes) or a function of the request; then it is honest.

    `requests` are those it got.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.script, running.requests = [], []
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def sandbox(server, monkeypatch):
    monkeypatch.setattr(fusion, "PAUSE_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with open_sandbox(
        SandboxOptions(kind="fusion", url=server.url + "/", timeout_s=7, memory_mib=100, output_chars=100)
    ) as opened:
        server.requests.clear()
        yield opened


def test_the_request_is_the_apis(sandbox, server):
    result = sandbox.run("print(stdin * 2)", stdin="ab", timeout_s=3)
    assert (result.status, result.stdout, result.exit_code, result.seconds, result.cut) == (
        "ok",
        "abab\n",
        0,
        0.25,
        False,
    )
    path, body = server.requests[0]
    assert path == "/run_code" and len(server.requests) == 1
    assert {key: body[key] for key in ("language", "run_timeout", "memory_limit_MB", "stdin")} == {
        "language": "python",
        "run_timeout": 3,
        "memory_limit_MB": 100 + fusion.INTERPRETER_MIB,
        "stdin": "ab",
    }


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("1/0", "error", 1),
        ("raise TimeoutError", "timeout", None),
        ("raise MemoryError", "memory", 1),
        ("pass", "ok", 0),
    ],
)
def test_what_becomes_of_code(sandbox, code, status, exit_code):
    result = sandbox.run(code)
    assert (result.status, result.exit_code) == (status, exit_code)


def test_output_is_cut_here_too(sandbox):
    result = sandbox.run("print('x' * 999 + 'y')")
    assert result.cut and result.stdout == "x" * 50 + "\n[... 901 characters cut]\n" + "x" * 48 + "y\n"


WRONG = [
    (500, b"oops"),
    (429, b"busy"),
    (200, b"not json"),
    (200, b"[1]"),
    (200, b"{}"),
    (200, b'{"status": "Success", "run_result": {"status": "Odd", "return_code": 0}}'),
    (200, b'{"status": "Success", "run_result": {"status": "Finished", "return_code": "0"}}'),
    (200, b'{"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "execution_time": "long"}}'),
    (200, b'{"status": "SandboxError", "message": "no room"}'),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failing_server_is_asked_three_times(sandbox, server, wrong):
    server.script = [wrong, wrong]
    assert sandbox.run("print(1)").stdout == "1\n"
    assert len(server.requests) == 3
    server.script = [wrong] * 3
    result = sandbox.run("print(1)")
    assert result.status == "unavailable" and server.url in result.stderr and not result.stdout
    assert len(server.requests) == 6


def test_a_refusal_is_not_asked_again(sandbox, server):
    server.script = [(422, b"language: unknown")]
    assert "HTTP 422: language: unknown" in sandbox.run("print(1)").stderr
    assert len(server.requests) == 1


def test_a_server_that_does_not_answer_is_left(sandbox, server, monkeypatch):
    held = threading.Event()
    server.script = [lambda body: (held.wait(60), honest(body))[1]] * 3
    monkeypatch.setattr(fusion, "GRACE_S", 0.05)
    result = sandbox.run("print(1)", timeout_s=0.5)
    held.set()
    assert len(server.requests) <= 1  # the tries share one deadline: an environment's step has one too
    assert result.status == "unavailable" and "imed out" in result.stderr and result.seconds < 60


def test_an_endless_answer_is_left(sandbox, server, monkeypatch):
    monkeypatch.setattr(fusion, "MAX_ANSWER", 1 << 17)
    server.script = [(200, b" " * (1 << 20))] * 3
    result = sandbox.run("print(1)")
    assert result.status == "unavailable" and "not complete" in result.stderr


def test_no_more_requests_at_a_time_than_allowed(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    active, most, lock, full = [0], [0], threading.Lock(), threading.Event()

    def slow(body):
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
            if active[0] == 2:
                full.set()
        full.wait(60)
        with lock:
            active[0] -= 1
        return honest({"code": "pass", "stdin": ""})

    with open_sandbox(SandboxOptions(kind="fusion", url=server.url, concurrency=2)) as opened:
        server.script = [slow] * 8
        threads = [threading.Thread(target=opened.run, args=("pass",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert most[0] == 2


def test_what_cannot_work_is_said_at_the_start(server, monkeypatch):
    monkeypatch.setattr(fusion, "PAUSE_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ConfigError, match="no address"):
        open_sandbox(SandboxOptions(kind="fusion", url="sandbox:8080"))
    with pytest.raises(ConfigError, match="keeps no variables"):
        open_sandbox(SandboxOptions(kind="fusion", url=server.url, session=True))
    server.script = [(500, b"down")] * 3
    with pytest.raises(ConfigError, match="does not run code: unavailable: .*HTTP 500: down"):
        open_sandbox(SandboxOptions(kind="fusion", url=server.url))
    with pytest.raises(ConfigError, match="refused|Refused"):
        open_sandbox(SandboxOptions(kind="fusion", url="http://127.0.0.1:9"))
