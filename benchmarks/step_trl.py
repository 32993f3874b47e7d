"""TRL's side of benchmarks/step.py: its GRPOTrainer, in the environment that `make bench-peers` builds."""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.step_work import Meter, Turns, Work, check_prompts, digest_of, memory_mib, reward


class MeasuredTrainer(GRPOTrainer):
    """A GRPOTrainer whose methods are timed; what they compute is TRL's own."""

    meter: Meter

    def _generate(self, prompts: list) -> Any:
        with self.meter.phase("rollout"):
            return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.meter.phase("rollout"):
            batch = super()._generate_and_score_completions(inputs)
        pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]
        step = self.meter.step
        step.prompts = digest_of(sorted(set(prompts)))
        step.prompt_tokens, step.unique_prompt_tokens = sum(map(len, prompts)), sum(map(len, set(prompts)))
        step.completion_tokens = int(batch["completion_mask"].sum())
        step.trained = int(batch["completion_mask"][batch["advantages"] != 0].sum())
        return batch

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> Any:
        with self.meter.phase("update" if torch.is_grad_enabled() else "old"):
            return super()._get_per_token_logps_and_entropies(*arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        with self.meter.phase("update"):
            return super().training_step(*arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        values = {**logs, **{name: sum(part) / len(part) for name, part in self._metrics["train"].items() if part}}
        if "grad_norm" in values:  # callbacks, which hand the step over, are called in here
            self.meter.step.grad_norm, self.meter.step.entropy = float(values["grad_norm"]), float(values["entropy"])
            self.meter.step.reward = float(values["reward"])
        super().log(logs, start_time)


class TakeTurns(TrainerCallback):
    """A step when the parent says so."""

    def __init__(self, meter: Meter, turns: Turns):
        self._meter, self._turns = meter, turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._turns.wait():
            raise KeyboardInterrupt
        self._meter.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer = self._meter.phase("update")
        self._optimizer.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer.__exit__(None, None, None)
        self._meter.step.updates += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ended = self._meter.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "grad_norm" in (logs or {}):
            self._turns.report(self._ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=json.loads, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    turns, work = Turns(memory_mib("VmRSS")), Work(**options.work)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    check_prompts(tokenizer, work)

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [reward(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            **{
                "num_generations": work.completions,
                "max_completion_length": work.completion_tokens,
                "learning_rate": work.lr,
                "seed": work.seed,
                "max_steps": 10_000,  # the parent says when it is enough
                "lr_scheduler_type": "constant",
                "use_cpu": True,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": 1,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                **options.settings,
            },
        )
        data = Dataset.from_dict({"prompt": work.texts()})
        trainer = MeasuredTrainer(
            model=options.model, reward_funcs=rewards, args=config, train_dataset=data, processing_class=tokenizer
        )
        trainer.meter = Meter(trainer.model)
        trainer.add_callback(TakeTurns(trainer.meter, turns))
        turns.report()
        try:
            trainer.train()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
