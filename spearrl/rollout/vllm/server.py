"""A running vLLM server as a rollout engine: token ids over HTTP.

The server: VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model DIR --api-key TOKEN
--enable-scale-out --logprobs-mode processed_logprobs --enable-prompt-tokens-details --worker-extension-cls
spearrl.rollout.vllm.worker_extension.WeightReceiver (on a processor also --no-enable-chunked-prefill: arguments.py).
vLLM asks for the token only below /v1 and /inference: its routes that pause it and change its weights are open to
whoever reaches the port.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from spearrl.config.sections import RolloutSection, VllmSection
from spearrl.errors import ConfigError, EngineError
from spearrl.rollout.protocol import Completion, Request, Sampling
from spearrl.rollout.vllm.arguments import check_version, model_config, sampling_arguments
from spearrl.rollout.vllm.event_loop import BackgroundEngine, versions
from spearrl.rollout.vllm.receiver import ServerWeights

CONNECT_S, HEALTH_S, ASK_S = 10.0, 5.0, 30.0
RETRIES = 2  # of connecting
GENERATE = "/inference/v1/generate"


class RemoteEngine(BackgroundEngine):
    """Samples on a vLLM server.

    Args:
        url: "http://host:8000".
        model_dir: the model it serves; says how large the vocabulary is, which the server does not check: a token
            beyond it would end it.
        settings: token_variable names the environment variable that holds the server's token.
    Raises:
        ConfigError: the server's version or its settings do not serve.
        EngineError: it cannot be reached, or refuses the token.
    """

    def __init__(
        self, url: str, model_dir: str | Path, settings: VllmSection, rollout: RolloutSection, *, name: str = ""
    ):
        import httpx

        config = model_config(model_dir)
        text_config = config.get("text_config", config)
        super().__init__(name or f"server {url}", rollout.context_tokens, model_dir)
        self.url, self.asleep, self._variable = url.rstrip("/"), False, settings.token_variable
        self._vocabulary = text_config["vocab_size"]
        token = os.environ.get(self._variable, "")
        # Connecting is tried again, with pauses; what the server may have begun is not.
        transport = httpx.AsyncHTTPTransport(retries=RETRIES, limits=httpx.Limits(max_connections=None))
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            transport=transport,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            trust_env=False,
        )
        try:
            self._meet(rollout)
        except BaseException:
            self.close()
            raise
        self.receiver = ServerWeights(self)

    def _meet(self, rollout: RolloutSection) -> None:
        """Check what would go wrong unnoticed: version, context, and which log-probabilities the server gives."""
        check_version("the server's vLLM", self.get("/version", ASK_S)["version"], where=self.name)
        holds = self.get("/v1/models", ASK_S)["data"][0].get("max_model_len")
        if holds and holds < rollout.context_tokens:
            expected = rollout.context_tokens
            hint = f"set rollout.context_tokens={holds}, or start the server with --max-model-len {expected}"
            text = f"the server holds {holds} tokens, rollout.context_tokens={expected}"
            raise ConfigError(text, where=self.name, hint=hint)
        only = Request((), (1,), sampling=Sampling(max_tokens=1, allowed_ids=(1,)))
        if self.run(lambda: self._complete(only), ASK_S, doing="first request").logprobs[0] < -1e-6:
            hint = "start the server with --logprobs-mode processed_logprobs"
            text = "the server's log-probabilities are those before temperature, top_p and allowed ids"
            raise ConfigError(text, where=self.name, hint=hint)

    def get(self, route: str, timeout_s: float) -> Any:
        """The parsed answer of a route. Raises EngineError: see `post`."""
        return self.run(lambda: self._ask("GET", route, None), timeout_s, doing=route)

    def post(self, route: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """The parsed answer of a route; None where it is empty.

        Raises:
            EngineError: no connection, no answer within timeout_s, token refused, or the server's own error; names the
                server and the route.
        """
        return self.run(lambda: self._ask("POST", route, body), timeout_s, doing=route)

    def health(self) -> bool:
        """Whether the server answers and is well; asks it."""
        if self._closed:
            return False
        try:
            self.get("/health", HEALTH_S)
        except EngineError:
            return False
        return True

    def _end(self) -> None:
        self.run(self._drop_all, ASK_S, doing="close")
        self.run(self._client.aclose, ASK_S, doing="close")

    async def _complete(self, request: Request) -> Completion:
        begun = self.version
        body: dict[str, Any] = {
            "token_ids": self._prompt_ids(request),
            "sampling_params": sampling_arguments(request.sampling, self._vocabulary, self._image_tokens),
        }
        if request.images:
            urls = (
                f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}" for image in request.images
            )
            body["content_parts"] = [{"type": "image_url", "url": url} for url in urls]
        answer = await self._ask("POST", GENERATE, body)
        try:
            reply = answer["choices"][0]
            tokens = tuple(reply["token_ids"])
            logprobs = tuple(float(token["logprob"]) for token in reply["logprobs"]["content"])
            cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"the server's answer has no {error}", hint=f"it must be vLLM with the route {GENERATE}"
            ) from error
        span = versions(reply.get("weight_versions"), begun, self.version)
        return Completion(tokens, logprobs, reply["finish_reason"], *span, cached)

    async def _ask(self, method: str, route: str, body: dict[str, Any] | None) -> Any:
        import httpx

        try:
            response = await self._client.request(method, route, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            hint = "start the server, or correct vllm.servers"
            raise EngineError(f"{self.url} cannot be reached: {error}", hint=hint) from error
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url} broke off: {type(error).__name__}: {error}") from error
        if response.status_code == 401:
            text = (
                f"refuses the token in {self._variable}"
                if os.environ.get(self._variable)
                else f"wants a token, and {self._variable} is not set"
            )
            raise EngineError(f"the server {text}", hint=f"export {self._variable}=... with the server's --api-key")
        if response.status_code == 404:
            hint = "start it with VLLM_SERVER_DEV_MODE=1, of a supported version"
            raise EngineError(f"the server has no {route}", hint=hint)
        if response.is_error:
            raise EngineError(f"the server answered {response.status_code}: {response.text[:500]}")
        return response.json() if response.content else None
