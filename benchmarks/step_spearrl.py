"""spearrl's side of benchmarks/step.py: its real trainer, one environment of one turn, the embedded engine."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.step_work import Meter, Turns, Work, check_prompts, digest_of, memory_mib, reward
from spearrl import Action, Environment, Observation, Outcome, Task
from spearrl.config import load_config
from spearrl.launch import assembly
from spearrl.trainer import Trainer


class Words(Environment):
    """One prompt, one reply."""

    max_turns = 1

    class Options(Environment.Options):
        work: str = "{}"

    def tasks(self, split: str) -> list[Task]:
        texts = Work(**json.loads(self.options.work)).texts()
        return [Task(f"prompt-{number}", split, {"text": text}) for number, text in enumerate(texts)]

    def reset(self, task: Task, seed: int) -> Observation:
        return Observation(task.data["text"])

    def step(self, action: Action) -> Outcome:
        value = reward(action.text)
        return Outcome(Observation(""), value, True, info={"success": value > 0.5})


def config_of(work: Work, options: argparse.Namespace, folder: str) -> Any:
    """GRPO with one optimiser step, everything else as spearrl has it."""
    return load_config(
        None,
        [
            "env.name=benchmarks.step_spearrl:Words",
            f"env.options.work={json.dumps(json.dumps(work.__dict__))}",
            f"model.path={options.model}",
            f"run.output_dir={folder}",
            "run.name=step",
            f"run.seed={work.seed}",
            "run.tensorboard=false",
            "run.trajectories_every=0",
            f"rollout.groups_per_step={work.prompts}",
            f"rollout.group_size={work.completions}",
            f"rollout.max_reply_tokens={work.completion_tokens}",
            f"rollout.context_tokens={work.prompt_tokens + work.completion_tokens}",
            f"rollout.slots={work.rows}",
            "learner.mini_batches=1",
            f"learner.lr={work.lr}",
            "sft.enabled=false",
            "eval.every=0",
            *options.settings,
        ],
        algo="grpo",
    )


def let_replies_never_end() -> None:
    """Take the model of the work, whose end token lies beyond its vocabulary so that replies have full length; a run
    refuses it.
    """
    assembly.check_vocabulary = lambda *_: None


def in_phase(meter: Meter, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def measured(*arguments: Any, **options: Any) -> Any:
        with meter.phase(name):
            return function(*arguments, **options)

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=json.loads, required=True)
    parser.add_argument("--settings", type=json.loads, default=[])
    options = parser.parse_args()
    turns, work = Turns(memory_mib("VmRSS")), Work(**options.work)
    let_replies_never_end()
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(config_of(work, options, folder)) as t,
    ):
        learner, meter = t.parts.learner, Meter(t.parts.model)
        t.play = in_phase(meter, "rollout", t.play)
        learner.logprobs = in_phase(meter, "old", learner.logprobs)
        update = learner.update

        def counted_update(on_policy: Any, *arguments: Any, **keywords: Any) -> Any:
            rows, step = on_policy.rows, meter.step
            prompts = [rows.token_ids[a:b][~rows.action_mask[a:b]].tolist() for a, b in spans(rows)]
            step.prompts = digest_of(sorted(set(map(tuple, prompts))))
            step.prompt_tokens, step.completion_tokens = sum(map(len, prompts)), int(rows.action_mask.sum())
            step.unique_prompt_tokens = sum(map(len, set(map(tuple, prompts))))
            step.trained = int((on_policy.advantages[on_policy.action_mask] != 0).sum())
            with meter.phase("update"):
                return update(on_policy, *arguments, **keywords)

        learner.update = counted_update
        check_prompts(t.parts.tokenizer, work)
        turns.report()
        while turns.wait():
            t.step += 1
            meter.begin()
            metrics = t.train_step(t.step)
            step = meter.end()
            step.updates, step.reward = int(metrics["policy/updates"]), metrics["rollout/reward"]
            step.grad_norm, step.entropy = metrics["policy/grad_norm"], metrics["policy/entropy"]
            turns.report(step)


def spans(rows: Any) -> list[tuple[int, int]]:
    """Where each row begins and ends."""
    offsets = rows.offsets.tolist()
    return list(zip(offsets[:-1], offsets[1:], strict=True))


if __name__ == "__main__":
    main()
