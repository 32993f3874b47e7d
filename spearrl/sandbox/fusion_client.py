"""A client of SandboxFusion's HTTP API (POST /run_code): the sandbox is a server's, the interface the same."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from spearrl.errors import ConfigError
from spearrl.sandbox.jail_program import OutputBuffer
from spearrl.sandbox.options import RunResult, Sandbox, SandboxOptions, SandboxSession, refusal, status_of

TRIES = 3
PAUSE_S = 0.5  # before the second try; twice that before the third
GRACE_S = 10.0  # of all tries together, on top of the run's own deadline
CONCURRENCY = 128  # as SPEAR's runs have it (spear.md 7.7)
INTERPRETER_MIB = 256  # the server's memory limit counts the interpreter and its packages too
MAX_ANSWER = 256 << 20  # bytes
SERVER = "`docker run -p 8080:8080 volcengine/sandbox-fusion:server-20250609` listens"


class RequestFailed(Exception):
    """A request that failed; `again`: another try may help."""

    def __init__(self, words: str, *, again: bool = True):
        super().__init__(words)
        self.again = again


class _RunAnswer(BaseModel):
    """The part `run_result` of an answer; a SandboxError has none."""

    model_config = ConfigDict(strict=True)
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None
    execution_time: float | None = None


class FusionSandbox(Sandbox):
    """Sends every run to a server. The server keeps nothing between runs, so there are no sessions."""

    def __init__(self, options: SandboxOptions):
        if not options.url.startswith(("http://", "https://")):
            complaint = f"sandbox.url={options.url!r} is no address of a SandboxFusion server"
            hint = f"sandbox.url=http://HOST:8080, where {SERVER}"
            raise ConfigError(complaint, where="sandbox.kind=fusion", hint=hint)
        if options.session:
            raise _no_sessions("sandbox.session=true", "sandbox.session=false, or kind=bubblewrap")
        self.options = options
        self.concurrency = options.concurrency or CONCURRENCY
        self._slots = threading.BoundedSemaphore(self.concurrency)
        # A connection a request: one that is kept may be closed by the server, or shared with a fork of this process.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(limits=limits)

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> RunResult:
        if refused := refusal(code):
            return refused
        seconds = timeout_s or self.options.timeout_s
        body = {
            "code": code,
            "language": "python",
            "run_timeout": seconds,
            "compile_timeout": seconds,
            "memory_limit_MB": self.options.memory_mib + INTERPRETER_MIB,
            "stdin": stdin,
            "files": {},
            "fetch_files": [],
        }
        with self._slots:
            start, failure = time.monotonic(), RequestFailed("")
            for attempt in range(TRIES):
                left_s = start + seconds + GRACE_S - time.monotonic() - PAUSE_S * attempt
                if attempt and (not failure.again or left_s <= 0):
                    break
                time.sleep(PAUSE_S * attempt)
                try:
                    return self._result(self._post(body, left_s))
                except RequestFailed as error:
                    failure = error
            words = f"{self.options.url}: {failure}"
            return RunResult("unavailable", stderr=words, seconds=time.monotonic() - start)

    def session(self) -> SandboxSession:
        raise _no_sessions("sandbox.kind=fusion", "run(), or kind=bubblewrap")

    def describe(self) -> str:
        return f"SandboxFusion at {self.options.url}"

    def close(self) -> None:
        """Nothing is kept open."""

    def _post(self, body: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The server's answer. Raises RequestFailed: none, a refusal, one that is late, too long or no JSON object."""
        deadline, url = time.monotonic() + limit_s, f"{self.options.url.rstrip('/')}/run_code"
        # Not json=body: httpx would refuse half a character in the code, which ASCII with escapes carries.
        request: dict[str, Any] = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
        text = bytearray()
        try:
            with self._client.stream("POST", url, timeout=limit_s, **request) as response:
                if not response.is_success:
                    excerpt = next(response.iter_bytes(500), b"").decode(errors="replace")
                    again = response.status_code >= 500 or response.status_code == 429
                    raise RequestFailed(f"HTTP {response.status_code}: {excerpt}", again=again)
                for piece in response.iter_bytes():
                    text += piece
                    if time.monotonic() > deadline or len(text) > MAX_ANSWER:
                        words = f"the answer is not complete after {limit_s:g} s and {len(text):,} bytes"
                        raise RequestFailed(words)
            answer = json.loads(text)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise RequestFailed(f"an answer that is no JSON: {error}") from error
        if not isinstance(answer, dict):
            raise RequestFailed(f"an answer that is no object: {str(answer)[:80]}")
        return answer

    def _result(self, answer: dict[str, Any]) -> RunResult:
        """What an answer says. Raises RequestFailed: the server's own failure, or an answer that the API has not."""
        try:
            run = _RunAnswer.model_validate(answer.get("run_result"))
        except ValidationError as error:
            raise RequestFailed(f"an answer without a sound run_result: {str(answer)[:500]}") from error
        out, err = OutputBuffer(self.options.output_chars), OutputBuffer(self.options.output_chars)
        for buffer, text in ((out, run.stdout), (err, run.stderr)):
            buffer.add((text or "").encode("utf-8", "replace"))
        timeout = run.status == "TimeLimitExceeded"
        exit_code, seconds = None if timeout else run.return_code, run.execution_time or 0.0
        status = status_of(exit_code, timeout, err.text())
        return RunResult(status, out.text(), err.text(), exit_code, seconds, bool(out.cut or err.cut))


def _no_sessions(where: str, hint: str) -> ConfigError:
    return ConfigError("SandboxFusion keeps no variables between runs", where=where, hint=hint)
