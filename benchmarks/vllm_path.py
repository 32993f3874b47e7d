"""What our rollout loop costs over vLLM alone on the same requests, and how much of an asynchronous run overlaps.

    OMP_NUM_THREADS=1 .venv-engines/bin/python -m benchmarks.vllm_path [--model smollm2-135m]
        [--only single multi ahead] [--rounds 4] [--json FILE]

`single` (a prompt of some 200 tokens, one reply) and `multi` (WebShop, one growing chat): the collector that training
uses plays episodes over its vLLM engine; then the same vLLM (AsyncLLM.generate, gathered on its own event loop) is
asked for the recorded requests, each episode's next prompt as soon as its reply is there, with no environment, text or
bookkeeping between. Both have the same weights, seeds and sampling arguments, play in changing order, and begin with an
empty prefix cache. A round in which the sampled tokens are not those that were recorded is not counted.
`ahead`: whole runs through the command line, synchronous and with rollout.max_staleness=1: shares of a step in which
the learner waited for episodes, and in which the engine had no request; of the steps but the first and the last.
`--model toy`: 3.7 M random parameters, of which vLLM's passes cost little, so that our loop shows most; what would end
a reply it cannot say. Runs of `ahead` then have the tiny preset's model, after a short cold start.
How weights come over: benchmarks/sync.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.agent_step import different_tokens
from benchmarks.step_spearrl import let_replies_never_end
from benchmarks.step_work import Work, write_model
from spearrl.rollout.vllm import arguments
from spearrl.rollout.vllm.worker_extension import WeightReceiver

GROUPS, SIBLINGS, REPLY, TURNS = 8, 4, 48, 4
PLAYED = {
    "single": [
        "env.name=benchmarks.step_spearrl:Words",
        f"env.options.work={json.dumps(json.dumps(asdict(Work(prompts=GROUPS, prompt_tokens=160))))}",
    ],
    "multi": ["env.name=webshop", "env.style=chat", 'env.options.observation="compact"', f"env.max_turns={TURNS}"],
}
STEPS = 6  # of a run of `ahead`
AHEAD = f"""rollout.engine=vllm rollout.workers=1 rollout.groups_per_step=4 rollout.group_size=4 env.max_turns=6
    rollout.max_reply_tokens=32 learner.precision=fp32 sft.episodes=40 sft.epochs=1 eval.every=0 eval.tasks=1
    run.threads=1 run.tensorboard=false run.steps={STEPS}""".split()
Replies = dict[tuple[int, ...], tuple[int, ...]]  # by request


class Counting(WeightReceiver):
    """vLLM's side, which counts its passes: a late request makes them more, and less full."""

    def passes(self, text: str) -> tuple[int, float, int]:
        """Passes since the first call, their processor seconds, and the tokens in them."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if not hasattr(self, "counted"):
            self.counted, self.seconds, self.tokens = 0, 0.0, 0
            runner.execute_model = self._timed(runner.execute_model)
            runner.sample_tokens = self._timed(runner.sample_tokens)
        return self.counted, self.seconds, self.tokens

    def _timed(self, function: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            start, planned = time.thread_time(), getattr(arguments[0], "total_num_scheduled_tokens", 0)
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - start
                self.counted, self.tokens = self.counted + (planned > 0), self.tokens + planned

        return timed


@dataclass(frozen=True)
class Round:
    """One side: seconds on the clock, processor seconds of this process and of vLLM's passes; those passes, and the
    tokens in them.
    """

    wall: float
    client: float
    model: float
    passes: int
    tokens: int
    same: bool


class Sides:
    """One vLLM, played by our collector or asked directly."""

    def __init__(self, model: str, stack: ExitStack):
        from spearrl.launch.assembly import players_of
        from spearrl.launch.factories import make_environment
        from spearrl.models import prepare_torch

        let_replies_never_end()
        arguments.EXTENSION = f"benchmarks.vllm_path.{Counting.__name__}"
        self.config = self._config(model, "single")
        environment = make_environment(self.config)
        players: Any = players_of(self.config, environment, prepare_torch(self.config), stack)
        self.model, self.stack, self.engine, self.asked = model, stack, players.engine, 0
        self.encoder = players.collector.encoder

    @staticmethod
    def _config(model: str, work: str) -> Any:
        from spearrl.config import load_config

        settings = [*PLAYED[work], f"model.path={model}", "rollout.engine=vllm", "learner.precision=fp32"]
        settings += ["rollout.context_tokens=2048", f"rollout.max_reply_tokens={REPLY}", "rollout.cache_mib=1024"]
        settings += [f"rollout.slots={GROUPS * SIBLINGS}", "run.threads=1"]
        return load_config(None, settings, algo="grpo")

    def take_up(self, work: str) -> None:
        """Go on with the environment of this work."""
        from spearrl.envs import tasks_of
        from spearrl.launch.factories import make_collector, make_environment, make_pool

        config = self._config(self.model, work)
        environment = make_environment(config)
        pool = make_pool(config, environment)
        self.stack.callback(pool.close)
        self.collector = make_collector(config, self.engine, self.encoder, pool, sampling=(1.0, 1.0))
        self.tasks = tasks_of(environment, "train", setting="rollout.train_split")[:GROUPS]

    def record(self) -> dict[str, int]:
        """Play the work once; what both sides do from then on: requests, tokens in, out and different ones."""
        generate, self.requests = self.engine.generate, dict[tuple[int, ...], Any]()

        async def recorded(request: Any) -> Any:
            self.requests[request.id] = request
            return await generate(request)

        self.engine.generate = recorded
        groups = self._collect()
        self.engine.generate, self.replies = generate, replies_of(groups)
        prompts = sum(len(request.token_ids) for request in self.requests.values())
        out = sum(map(len, self.replies.values()))
        if self.requests.keys() != self.replies.keys():
            faults = [trajectory.error for group in groups for trajectory in group.trajectories if trajectory.error]
            raise SystemExit(f"{len(self.requests)} requests have {len(self.replies)} replies: {faults[:1]}")
        return {"requests": len(self.requests), "in": prompts, "out": out, "different": different_tokens(groups)}

    def play(self, side: str) -> Round:
        """One side's turn."""
        self.engine.run(self.engine.llm.reset_prefix_cache, 60, doing="emptying the cache")
        self.asked += 1
        before = self._passes()
        start, client = time.perf_counter(), time.process_time()
        if side == "vLLM":
            replies = self.engine.run(self._ask, 900, doing="raw requests")
        else:
            groups = self._collect()
        seconds = time.perf_counter() - start, time.process_time() - client
        passes, model, tokens = (now - then for now, then in zip(self._passes(), before, strict=True))
        return Round(
            *seconds, model, passes, tokens, same=(replies if side == "vLLM" else replies_of(groups)) == self.replies
        )

    def _passes(self) -> tuple[int, float, int]:
        llm = self.engine.llm
        return self.engine.run(lambda: llm.collective_rpc("passes", args=("",)), 60, doing="counting")[0]

    def _collect(self) -> Any:
        return self.collector.collect(self.tasks, SIBLINGS, run_seed=0, step=1, first_group_id=0)

    async def _ask(self) -> Replies:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from spearrl.rollout.vllm.arguments import sampling_arguments

        async def episode(group: int, sibling: int) -> Replies:
            replies, turn = {}, 0
            while request := self.requests.get((group, sibling, turn)):
                parameters = SamplingParams(
                    **sampling_arguments(request.sampling, self.engine._vocabulary),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                prompt = {"type": "token", "prompt_token_ids": list(request.token_ids)}
                stream = self.engine.llm.generate(prompt, parameters, f"raw-{self.asked}-{request.id}")
                replies[request.id] = tuple([output async for output in stream][-1].outputs[0].token_ids)
                turn += 1
            return replies

        episodes = await asyncio.gather(*(episode(g, s) for g in range(GROUPS) for s in range(SIBLINGS)))
        return {key: tokens for replies in episodes for key, tokens in replies.items()}


def replies_of(groups: Any) -> Replies:
    """Sampled tokens of every turn, by the id of its request."""
    return {
        (group.id, trajectory.sibling, turn): played.token_ids
        for group in groups
        for trajectory in group.trajectories
        for turn, played in enumerate(trajectory.turns)
    }


def loop_cost(sides: Sides, name: str, rounds: int) -> dict[str, Any]:
    """Our loop over vLLM alone: ratios of medians, and this process's milliseconds a request."""
    sides.take_up(name)
    work = sides.record()
    print(f"{name}: {work}", flush=True)
    measured: dict[str, list[Round]] = {"spearrl": [], "vLLM": []}
    for number in range(rounds):
        order = ("spearrl", "vLLM") if number % 2 else ("vLLM", "spearrl")
        pair = {side: sides.play(side) for side in order}
        if not all(played.same for played in pair.values()):
            print(f"  round {number}: other tokens were sampled than in the recording; not counted")
            continue
        for side, played in pair.items():
            measured[side].append(played)
    if len(measured["vLLM"]) * 2 <= rounds:
        raise SystemExit(f"{name}: the sides did the same in {len(measured['vLLM'])} of {rounds} rounds only")
    return {**work, **summary(measured, work["requests"])}


def summary(measured: dict[str, list[Round]], requests: int) -> dict[str, Any]:
    """Ratios of both sides of a round: on the clock (median, least, largest) and of processor seconds, which other jobs
    change less; what this process computes beyond what it does for vLLM alone, in milliseconds a request.
    """
    pairs = list(zip(measured["spearrl"], measured["vLLM"], strict=True))
    walls = sorted(ours.wall / raw.wall for ours, raw in pairs)
    processor = [(ours.client + ours.model) / (raw.client + raw.model) for ours, raw in pairs]
    figures = {
        "wall": statistics.median(walls),
        "least": walls[0],
        "largest": walls[-1],
        "processor": statistics.median(processor),
        "ms a request": 1e3 * statistics.median(ours.client - raw.client for ours, raw in pairs) / requests,
    }
    for side, played in measured.items():
        kinds = ("wall", "client", "model", "passes", "tokens")
        figures |= {f"{side} {kind}": statistics.median(getattr(r, kind) for r in played) for kind in kinds}
    print("  " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    return figures


def ahead(model: str, staleness: int) -> dict[str, float]:
    """A run, and the idle shares of its two sides."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*AHEAD, f"rollout.max_staleness={staleness}", f"run.output_dir={folder}", "run.name=run"]
        settings += [f"model.path={model}"] if model != "toy" else []
        command = [sys.executable, "-m", "spearrl", "train", "--preset", "tiny", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
        lines = (Path(folder) / "run" / "events.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"][1:-1]

    def seconds(part: str) -> float:
        return sum(step.get(f"time/{part}", 0.0) for step in steps)

    figures = {
        "step s": seconds("step") / len(steps),
        "learner waits": seconds("rollout") / seconds("step"),
        "engine idle": 1 - seconds("engine") / seconds("step"),
        "sync": seconds("sync") / seconds("step"),
        "tokens": sum(step["rollout/tokens"] for step in steps) / len(steps),
        "tokens learnt from": sum(step.get("update/tokens", 0.0) for step in steps) / len(steps),
        "staleness": max(step.get("policy/staleness_max", 0.0) for step in steps),
    }
    print(f"max_staleness={staleness}: " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy", help="directory or name")
    parser.add_argument("--only", nargs="+", choices=[*PLAYED, "ahead"], default=[*PLAYED, "ahead"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model == "toy":
            model = f"{folder}/toy"
            write_model(Path(model), Work())
        loops = [name for name in options.only if name != "ahead"]
        with ExitStack() as stack:
            sides = Sides(model, stack) if loops else None
            figures |= {name: loop_cost(sides, name, options.rounds) for name in loops if sides is not None}
    if "ahead" in options.only:
        figures |= {f"max_staleness={k}": ahead(options.model, k) for k in (0, 1)}
    ratios = {f"vLLM alone / spearrl: {name}": 1 / figures[name]["wall"] for name in PLAYED if name in figures}
    machine.write(options.json, ratios=ratios, figures=figures)


if __name__ == "__main__":
    main()
