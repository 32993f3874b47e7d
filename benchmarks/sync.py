"""A weight sync through vLLM, phase by phase: random weights of a Qwen3-type model, one engine of this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.sync [--million 21] [--dtype float32] [--syncs 12] [--bucket-mib 256]
        [--json FILE]

Phases as the bridge passes them, so that overlapping work shows once: `write` runs while the engine pauses, digests of
what is sent are computed while it loads. Every sync is verified (digests, probe); the first is left out of the table.
After each sync the same bytes are only copied, as fast as memory allows: in this process into a mapped file in shared
memory (copy out), in vLLM's worker from there into memory that it holds (copy in). One after the other they are the
limit that a sync through host memory could reach, without its checks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import machine
from spearrl.config.sections import LearnerSection, RolloutSection, SyncSection, VllmSection
from spearrl.learner import LocalLearner
from spearrl.models import save_weights
from spearrl.rollout.vllm import VLLMEngine, arguments
from spearrl.rollout.vllm.worker_extension import WeightReceiver
from spearrl.sync import Bridge

SHAPES = {  # millions of parameters: width, layers, vocabulary
    1: (128, 3, 2048),
    5: (256, 5, 4096),
    21: (512, 6, 2048),
    100: (1024, 7, 8192),
}


class Copier(WeightReceiver):
    """vLLM's side, which copies too."""

    def copy_in(self, text: str) -> float:
        """Seconds of copying a mapped file's bytes into memory that was used before."""
        plan = json.loads(text)
        source = torch.from_file(plan["path"], shared=True, size=plan["bytes"], dtype=torch.uint8)
        if getattr(self, "target", None) is None:
            self.target = torch.zeros(plan["bytes"], dtype=torch.uint8)
            self.target.copy_(source)
        start = time.perf_counter()
        self.target.copy_(source)
        return time.perf_counter() - start


def copy_out(model: torch.nn.Module, mapped: torch.Tensor) -> float:
    """Seconds of copying a model's parameters into a mapped file."""
    start, end = time.perf_counter(), 0
    for parameter in model.parameters():
        begin, end = end, end + parameter.nbytes
        mapped[begin:end].copy_(parameter.detach().view(-1).view(torch.uint8))
    return time.perf_counter() - start


def copies(model: torch.nn.Module, engine: VLLMEngine, path: Path) -> dict[str, float]:
    """Milliseconds of the two copies that a sync through host memory cannot do without."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    if not mapped.any():
        copy_out(model, mapped)  # fresh pages cost more
    out, plan = copy_out(model, mapped), json.dumps({"path": str(path), "bytes": size})
    back = engine.run(lambda: engine.llm.collective_rpc("copy_in", args=(plan,)), 60, doing="copy")[0]
    return {"ms copy out": 1e3 * out, "ms copy in": 1e3 * back, "ms both copies": 1e3 * (out + back)}


def random_model(million: int, dtype: torch.dtype):
    """A tied Qwen3 model of about that size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width, layers, vocabulary = SHAPES[million]
    torch.manual_seed(0)
    shape = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    config = Qwen3Config(
        **shape, **heads, tie_word_embeddings=True, max_position_embeddings=512, initializer_range=0.7 / width**0.5
    )
    return Qwen3ForCausalLM(config).eval().to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million", type=int, default=21, choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--syncs", type=int, default=12)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exact = args.dtype == "float32"
    model = random_model(args.million, torch.float32 if exact else torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(model, folder)
        settings = RolloutSection(context_tokens=256, slots=8, cache_mib=64)
        arguments.EXTENSION = f"benchmarks.sync.{Copier.__name__}"
        engine = VLLMEngine(folder, VllmSection(), settings, precision="fp32" if exact else "bf16", threads=1)
        learner = LocalLearner(model, LearnerSection(precision="fp32"))
        sync = SyncSection(bucket_mib=args.bucket_mib)
        ids = list(range(24))
        bridge = Bridge(
            learner, [engine.receiver], settings=sync, probe_ids=ids, run_folder=Path(folder), float32=exact
        )
        try:
            with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
                path = Path(file.name)
                measured = [
                    measure(bridge, model, version) | copies(model, engine, path)
                    for version in range(1, args.syncs + 1)
                ][1:]
        finally:
            bridge.close()
            engine.close()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{size:.1f} M parameters, {args.dtype}, {measured[0]['sync/bytes'] / 2**20:.0f} MiB in "
        f"{measured[0]['sync/buckets']:.0f} bucket(s)"
    )
    for name in measured[0]:
        values = [line[name] for line in measured]
        if name.startswith("ms "):
            print(
                f"  {name[3:]:11} median {statistics.median(values):7.1f} ms   best {min(values):7.1f}   worst "
                f"{max(values):7.1f}"
            )
    print(
        f"  probe gap at most {max(line['sync/probe_gap'] for line in measured):.2g} nats, sent again "
        f"{sum(line['sync/resent'] for line in measured):.0f} times"
    )
    over = {name: [line[f"ms {name}"] / line["ms both copies"] for line in measured] for name in ("paused", "in all")}
    print("  over both copies: " + ", ".join(f"{name} {statistics.median(r):.1f}" for name, r in over.items()))
    medians = {name: statistics.median(line[name] for line in measured) for name in measured[0]}
    machine.write(
        args.json, ratios={}, figures=medians | {f"{n} / copies": statistics.median(r) for n, r in over.items()}
    )


def measure(bridge: Bridge, model: torch.nn.Module, version: int) -> dict[str, float]:
    """One sync after a small change of every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    metrics = bridge.publish(version)
    laps = {f"ms {phase}": 1e3 * seconds for phase, seconds in bridge.laps.items()}
    return {
        **metrics,
        **laps,
        "ms paused": 1e3 * metrics["sync/pause_seconds"],
        "ms in all": 1e3 * metrics["sync/seconds"],
    }


if __name__ == "__main__":
    main()
