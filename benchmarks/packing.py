"""An update with padded rows and with a prefix tree: seconds, tokens computed, peak memory.

    OMP_NUM_THREADS=2 python -m benchmarks.packing [--work group|chat|skewed] [--tokens 16384] [--json FILE]

Work: `group`: 16 prompts of 256 tokens with 8 replies of 32 each. `chat`: 8 groups of 8 episodes of 4 turns, of which
every turn is a row that begins with all before it. `skewed`: 96 rows of lognormal lengths that share nothing. Each
packing runs in a process of its own; every one computes the same log-probabilities, which is checked.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import machine
from spearrl.batching import Batch, Rows, TurnTable, forward_inputs
from spearrl.config.sections import LearnerSection
from spearrl.learner import LocalLearner
from spearrl.losses import Objective

PACKINGS = ("padded", "tree")
VOCABULARY = 2048


def rows_of(sequences: list[tuple[list[int], int]]) -> Rows:
    """Rows (tokens, length of the reply at their end), one turn each."""
    lengths = torch.tensor([len(tokens) for tokens, _ in sequences])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    index = torch.arange(len(sequences))
    mask = torch.cat([torch.arange(len(tokens)) >= len(tokens) - reply for tokens, reply in sequences])
    turn = torch.where(mask, torch.repeat_interleave(index, lengths), -1)
    zero, none = torch.zeros(len(index), dtype=torch.int64), torch.zeros(len(index), dtype=torch.float64)
    table = TurnTable(index // 8, index, index, none, none, zero, zero, row=index)
    return Rows(
        token_ids=torch.tensor([token for tokens, _ in sequences for token in tokens]),
        action_mask=mask,
        turn_index=turn,
        rollout_logprobs=torch.where(mask, -1.0, 0.0),
        policy_version=torch.where(mask, 0, -1),
        offsets=offsets,
        group=index // 8,
        trajectory=index,
        uid=index,
        turns=table,
    )


def work(kind: str) -> Rows:
    """The rows of `--work`."""
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (length,), generator=draw).tolist()

    if kind == "group":
        prompts = [text(256) for _ in range(16)]
        return rows_of([(prompt + text(32), 32) for prompt in prompts for _ in range(8)])
    if kind == "chat":
        rows = []
        for prompt in [text(200) for _ in range(8)]:
            for _ in range(8):
                chat = list(prompt)
                for _ in range(4):
                    chat = [*chat, *text(24)]
                    rows.append((chat, 24))
                    chat = [*chat, *text(60)]
        return rows_of(rows)
    lengths = torch.empty(96).log_normal_(4.0, 1.0, generator=draw).clamp(8, 1000).int().tolist()
    return rows_of([(text(n), n - n // 4) for n in lengths])


def measure(kind: str, packing: str, tokens: int) -> dict[str, float]:
    """One optimiser step, without the old log-probabilities; the best of three."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**shape, intermediate_size=688, vocab_size=VOCABULARY, tie_word_embeddings=True)
    settings = LearnerSection(packing=packing, micro_batch_tokens=tokens, mini_batches=1, precision="fp32")
    learner, rows = LocalLearner(Qwen2ForCausalLM(config), settings), work(kind)
    logprobs = learner.logprobs(rows)
    batch = Batch(rows, rows.pad(torch.ones(len(rows.token_ids))), logprobs)
    passes = [forward_inputs(rows.select(index), tree=packing == "tree") for index in learner.passes.pieces(rows)]
    seconds = []
    for seed in range(3):
        start = time.perf_counter()
        learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=seed)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": min(seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "passes": len(passes),
        "tokens_of_rows": len(rows.token_ids),
        "tokens_computed": sum(inputs.token_ids.numel() for inputs in passes),
        "tokens_trained": sum(len(inputs.target) for inputs in passes),
        "logprobs": float(logprobs.double().sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=["group", "chat", "skewed"], default="group")
    parser.add_argument("--tokens", type=int, default=16384, help="learner.micro_batch_tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PACKINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        return print(json.dumps(measure(arguments.work, arguments.only, arguments.tokens)))
    command = [sys.executable, "-m", "benchmarks.packing", f"--work={arguments.work}", f"--tokens={arguments.tokens}"]
    results = {}
    for packing in PACKINGS:
        done = subprocess.run([*command, f"--only={packing}"], check=True, capture_output=True, text=True)
        results[packing] = json.loads(done.stdout.splitlines()[-1])
        print(packing, {name: round(value, 3) for name, value in results[packing].items()})
    sums = [result["logprobs"] for result in results.values()]
    if max(sums) - min(sums) > 1e-5 * abs(sums[0]):
        raise SystemExit(f"the packings disagree: sums of log-probabilities {sums}")
    ratios = {name: results["padded"][name] / results["tree"][name] for name in ("seconds", "peak_mib")}
    print("padded / tree:", {name: round(ratio, 2) for name, ratio in ratios.items()})
    ratios = {f"padded / tree, {arguments.work}: {name}": ratio for name, ratio in ratios.items()}
    memory = {f"peak, {arguments.work}, {packing}": result["peak_mib"] for packing, result in results.items()}
    machine.write(arguments.json, ratios=ratios, memory_mib=memory, figures=results)


if __name__ == "__main__":
    main()
