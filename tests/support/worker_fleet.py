"""A fleet of real worker processes over a tiny model, for tests; `python -m tests.support.worker_fleet <folder>` plays
on one until it is stopped.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from spearrl.config import RunConfig
from spearrl.launch.factories import make_environment
from spearrl.launch.worker_process import processes
from spearrl.models import build_tiny, save_model
from spearrl.rollout.workers.fleet import Fleet
from spearrl.rollout.workers.messages import Start
from tests.support.small_run import small_config

WORDS = "look say red blue green pink gold gray want or nothing happens it is end now show turn fine hang once exit"


def saved_model(folder: Path) -> str:
    """A directory with an untrained model and its tokenizer."""
    config = small_config(folder)
    save_model(*build_tiny([WORDS, f" {WORDS}"] * 20, config.model.tiny, 0), folder / "model")
    return str(folder / "model")


def config_of(folder: Path, *changes: str) -> RunConfig:
    return small_config(folder, "rollout.workers=2", "rollout.cache_mib=64", *changes)


def open_fleet(model: str, folder: Path, *changes: str, on_start=None) -> Fleet:
    """Two workers that log into `folder`."""
    folder.mkdir(exist_ok=True)
    config = config_of(folder, *changes)
    return Fleet(config, processes(Start(config, model), folder), on_start=on_start)


def main(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    fleet = open_fleet(
        str(folder / "model"),
        folder,
        "env.name=tests.support.faulty_envs:Threaded",
        f"env.options.gate={folder / 'gate'}",
    )
    print(*(worker.pid for worker in fleet), flush=True)
    try:
        fleet.collector(1.0, 1.0).collect(
            make_environment(fleet.config).tasks("train"), 2, run_seed=0, step=1, first_group_id=0
        )
    finally:
        fleet.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
