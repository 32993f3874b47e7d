"""A client of SandboxFusion's HTTP API (POST /run_code): the sandbox is a server's, the interface the same."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spearrl.errors import ConfigError
from spearrl.sandbox.inside import Kept
from spearrl.sandbox.options import Result, Sandbox, SandboxOptions, Session, refusal, verdict

TRIES = 3
PAUSE_S = 0.5  # before the second try; twice that before the third
GRACE_S = 10.0  # of all tries together, on top of the run's own deadline
CONCURRENCY = 128  # as SPEAR's runs have it (spear.md 7.7)
INTERPRETER_MIB = 256  # the server's memory limit counts the interpreter and its packages too
MAX_ANSWER = 256 << 20
PIECE = 1 << 16


class Trouble(Exception):
    """A request that failed; `again`: another try may help."""

    def __init__(self, words: str, *, again: bool = True):
        super().__init__(words)
        self.again = again


class _Run(BaseModel):
    """The part `run_result` of an answer; a SandboxError has none."""

    model_config = ConfigDict(strict=True)
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None
    execution_time: float | None = None


class FusionSandbox(Sandbox):
    """Sends every run to a server. It keeps nothing between runs, so there are no sessions."""

    def __init__(self, options: SandboxOptions):
        if not options.url.startswith(("http://", "https://")):
            hint = "sandbox.url=http://HOST:8080, where `docker run -p 8080:8080 volcengine/sandbox-fusion:server-20250609` listens"
            raise ConfigError(
                f"sandbox.url={options.url!r} is no address of a SandboxFusion server",
                where="sandbox.kind=fusion",
                hint=hint,
            )
        if options.session:
            raise ConfigError(
                "SandboxFusion keeps no variables between runs",
                where="sandbox.session=true",
                hint="sandbox.session=false, or kind=bubblewrap",
            )
        self.options = options
        self.concurrency = options.concurrency or CONCURRENCY
        self._slots = threading.BoundedSemaphore(self.concurrency)

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> Result:
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
            begun, trouble = time.monotonic(), Trouble("")
            for attempt in range(TRIES):
                left = begun + seconds + GRACE_S - time.monotonic() - PAUSE_S * attempt
                if attempt and (not trouble.again or left <= 0):
                    break
                time.sleep(PAUSE_S * attempt)
                try:
                    return self._result(self._post(body, left))
                except Trouble as error:
                    trouble = error
            return Result("unavailable", stderr=f"{self.options.url}: {trouble}", seconds=time.monotonic() - begun)

    def session(self) -> Session:
        raise ConfigError(
            "SandboxFusion keeps no variables between runs",
            where="sandbox.kind=fusion",
            hint="run(), or kind=bubblewrap",
        )

    def means(self) -> str:
        return f"SandboxFusion at {self.options.url}"

    def close(self) -> None:
        """Nothing is kept open."""

    def _post(self, body: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The server's answer. Raises Trouble: none, a refusal, one that is late, too long or no JSON object."""
        deadline = time.monotonic() + limit_s
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.options.url.rstrip('/')}/run_code", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as reply:
                text = bytearray()
                while piece := reply.read1(PIECE):
                    text += piece
                    if time.monotonic() > deadline or len(text) > MAX_ANSWER:
                        raise Trouble(f"the answer is not complete after {limit_s:g} s and {len(text):,} bytes")
            answer = json.loads(text)
        except urllib.error.HTTPError as error:
            with error:
                raise Trouble(
                    f"HTTP {error.code}: {error.read(500).decode(errors='replace')}",
                    again=error.code >= 500 or error.code == 429,
                ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Trouble(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise Trouble(f"an answer that is no JSON: {error}") from error
        if not isinstance(answer, dict):
            raise Trouble(f"an answer that is no object: {str(answer)[:80]}")
        return answer

    def _result(self, answer: dict[str, Any]) -> Result:
        """What an answer says. Raises Trouble: the server's own failure, or an answer that is not as the API has it."""
        try:
            run = _Run.model_validate(answer.get("run_result"))
        except ValidationError as error:
            raise Trouble(f"an answer without a sound run_result: {str(answer)[:500]}") from error
        out, err = Kept(self.options.output_chars), Kept(self.options.output_chars)
        for kept, text in ((out, run.stdout), (err, run.stderr)):
            kept.add((text or "").encode("utf-8", "replace"))
        timeout = run.status == "TimeLimitExceeded"
        code = None if timeout else run.return_code
        return Result(
            verdict(code, timeout, err.text()),
            out.text(),
            err.text(),
            code,
            run.execution_time or 0.0,
            bool(out.cut or err.cut),
        )
