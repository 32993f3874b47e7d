"""Who gets which GPU: worked out from settings and a list of GPUs, on machines that this one need not be."""

from __future__ import annotations

import json
import signal
import struct
import tomllib

import pytest

from spearrl.cli.main import main
from spearrl.config import resolve
from spearrl.errors import ConfigError
from spearrl.launch import assembly
from spearrl.launch import factories as parts
from spearrl.launch.assembly import Assembly, Players, launcher_of
from spearrl.launch.describe import arithmetic, describe
from spearrl.launch.devices import EXTRAS, Gpu, Machine, detect, imagined, parameters_of, visible
from spearrl.launch.launcher import serve_rank
from spearrl.launch.placement import GIB, place
from spearrl.processes import under_launcher

QWEN_1_5B = 1_543_714_304


def machine(gpus: int, **kinds) -> Machine:
    return Machine((Gpu("H100", 80 * GIB),) * gpus, **kinds)


def placed(host: Machine, *settings: str, parameters: int = QWEN_1_5B, preset: str = "webshop-1.5b"):
    """As `spearrl train` does it: what nobody set is worked out before the settings are checked."""
    placements = []

    def derive(config, unset):
        placements.append(place(config, host, derive=unset, parameters=parameters))
        return placements[0].derived

    resolved = resolve(None, settings, preset=preset, derive=derive)
    assert resolved.config == placements[0].config
    return placements[0]


def test_processors_leave_the_settings_alone():
    placement = placed(machine(0), "learner.backend=deepspeed", "learner.processes=2", "rollout.workers=2")
    assert (
        placement.derived == {}
        and placement.learner == ()
        and placement.engines == ()
        and placement.rank_environment(1) == {}
        and placement.worker_environment(0) == {}
    )
    assert "processors only" in describe(placement) and "2 ranks" in describe(placement)
    laptop = placed(machine(0))
    assert describe(laptop) == arithmetic(laptop.config)  # nothing was placed: nothing to say


def test_one_gpu_needs_no_configuration():
    placement = placed(machine(1))
    assert placement.derived == {
        "rollout.engine": "vllm",
        "vllm.memory_fraction": 0.65,
    }  # 80 - 23 (learner) - 3 (kept) of 80, rounded down
    assert (placement.learner, placement.engines, placement.colocated, placement.sleeps) == ((0,), ((0,),), True, True)
    assert placement.config.learner.backend == "local" and placement.config.rollout.workers == 0
    without = placed(machine(1, extras=()))
    assert (
        without.config.rollout.engine == "local"
        and not without.sleeps
        and any("vllm is not installed" in note for note in without.notes)
    )
    ahead = placed(machine(1), "rollout.max_staleness=1")
    assert ahead.config.rollout.workers == 1 and not ahead.sleeps and ahead.config.vllm.memory_fraction < 0.65 / 1.9


@pytest.mark.parametrize(
    ("host", "settings", "transport", "sleeps"),
    [
        (machine(1), (), "ipc", True),
        (machine(1), ("rollout.workers=1", "rollout.max_staleness=1"), "ipc", False),  # one GPU for both, both awake
        (machine(2), (), "ipc", True),
        (machine(2), ("rollout.max_staleness=1",), "nccl", False),
        (machine(8, ranks=8, local_ranks=4), (), "nccl", False),
        (machine(2), ("rollout.max_staleness=1", "sync.transport=shared_memory"), None, False),
    ],
)
def test_every_engine_gets_what_the_placement_decided(monkeypatch, tmp_path, host, settings, transport, sleeps):
    """In the trainer's process and in a worker: how weights reach it, and whether it gives its memory back."""
    placement = placed(host, *settings)
    config = placement.config.with_settings({"placement.mode": "auto"})
    assert place(config, host).colocated == placement.colocated
    monkeypatch.setattr(parts, "VLLMEngine", lambda model, *_, transfer_backend, sleep, **__: (transfer_backend, sleep))
    monkeypatch.setattr(assembly, "processes", lambda start, *_: start)
    start = launcher_of(config.with_settings({"rollout.launcher": "processes"}), "model", placement, tmp_path)
    assert (start.colocated, start.sleeps) == (placement.colocated, placement.sleeps)
    for decided in (start, placement):
        engine = parts.make_engine(config, "model", device="cuda", colocated=decided.colocated, sleeps=decided.sleeps)
        assert engine == (transport, sleeps)


def test_a_model_built_from_scratch_stays_on_one_gpu_unless_asked():
    placement = placed(machine(8), preset="tiny", parameters=0)
    assert placement.derived == {} and placement.learner == (0,)
    on_eight = placed(machine(8), "placement.gpus=8", preset="tiny", parameters=0)
    assert on_eight.config.learner.processes == 8 and on_eight.config.rollout.engine == "vllm"


def test_eight_gpus_take_turns():
    placement = placed(machine(8))
    assert placement.derived == {
        "rollout.engine": "vllm",
        "learner.backend": "deepspeed",
        "learner.processes": 8,
        "rollout.workers": 8,
        "vllm.memory_fraction": 0.85,
    }
    assert (
        placement.learner == tuple(range(8)) and placement.engines == tuple((i,) for i in range(8)) and placement.sleeps
    )
    assert placement.rank_environment(3) == placement.worker_environment(3) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert placement.config.learner.zero_stage == 3 and any(
        "learner.zero_stage=1 would fit too" in note for note in placement.notes
    )
    two = placed(machine(8), "vllm.tensor_parallel=4")
    assert two.engines == ((0, 1, 2, 3), (4, 5, 6, 7)) and two.worker_environment(1) == {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7"
    }


@pytest.mark.parametrize(
    ("settings", "learner", "engines"),
    [
        ((), 4, 4),
        (("vllm.tensor_parallel=2",), 4, 2),
        (("vllm.tensor_parallel=4",), 4, 1),
        (("learner.processes=2",), 2, 6),
        (("rollout.workers=5",), 3, 5),
        (("learner.processes=2", "rollout.workers=3"), 2, 3),
    ],
)
def test_engines_that_run_ahead_have_gpus_of_their_own(settings, learner, engines):
    placement = placed(machine(8), "rollout.max_staleness=1", *settings)
    assert (
        (len(placement.learner), len(placement.engines)) == (learner, engines)
        and not placement.colocated
        and not placement.sleeps
    )
    used = [*placement.learner, *(gpu for group in placement.engines for gpu in group)]
    assert len(used) == len(set(used)) and max(used) < 8
    assert (len(used) < 8) == any("nothing to do" in note for note in placement.notes)
    assert placement.config.learner.processes == learner and placement.config.rollout.workers == engines


def test_several_machines():
    half = placed(machine(8, ranks=8, local_ranks=4))  # torchrun --nnodes 2 --nproc_per_node 4
    assert half.learner == (0, 1, 2, 3, 8, 9, 10, 11) and half.engines == tuple(
        (gpu,) for gpu in (4, 5, 6, 7, 12, 13, 14, 15)
    )
    assert half.config.rollout.launcher == "ray" and not half.colocated and not half.sleeps
    assert half.rank_environment(5) == {"CUDA_VISIBLE_DEVICES": "1"} and half.worker_environment(4) == {
        "CUDA_VISIBLE_DEVICES": "4"
    }
    wide = placed(machine(8, ranks=6, local_ranks=3), "vllm.tensor_parallel=2")
    assert wide.engines == ((3, 4), (5, 6), (11, 12), (13, 14)) and any(
        "GPUs 7, 15 have" in note for note in wide.notes
    )  # 7 and 15: no engine over machines
    apart = placed(machine(8), "placement.gpus=16", "rollout.launcher=ray")
    assert apart.learner == tuple(range(8)) and apart.engines[0] == (8,) and len(apart.engines) == 8
    assert apart.worker_environment(0) == {"CUDA_VISIBLE_DEVICES": "0"}
    ranks = placed(machine(0, ranks=2, local_ranks=2))
    assert ranks.derived == {"learner.backend": "deepspeed", "learner.processes": 2}
    servers = placed(machine(2), "vllm.servers=http://a:8000")
    assert (
        placed(machine(2), "vllm.servers=http://a:8000, http://b:8000").config.rollout.workers == 2
    )  # each is spoken to
    assert (
        servers.config.rollout.workers == 0
        and servers.engines == ()
        and len(servers.learner) == 2
        and servers.config.rollout.engine == "vllm"
        and "http://a:8000" in describe(servers)
    )


@pytest.mark.parametrize(
    ("host", "settings", "message", "fix"),
    [
        (
            machine(3),
            ("vllm.tensor_parallel=2",),
            "3 GPUs do not divide by vllm.tensor_parallel=2",
            "use --gpus 2, or vllm.tensor_parallel=1 or 3",
        ),
        (
            machine(3),
            ("vllm.tensor_parallel=2", "rollout.workers=2"),
            "3 learner processes and 2 engines of 2 GPUs do not fit colocated on 3 GPUs",
            "leave",
        ),
        (machine(4), ("learner.processes=8",), "this machine has 4 GPUs", "learner.processes=4"),
        (
            machine(4),
            ("learner.processes=3", "rollout.workers=2", "rollout.max_staleness=1"),
            "3 learner processes and 2 engines of 1 GPU",
            "leave",
        ),
        (
            machine(4),
            ("rollout.max_staleness=1", "rollout.workers=4"),
            "1 learner process and 4 engines of 1 GPU",
            "leave",
        ),
        (machine(1), ("placement.mode=disaggregated",), "there is 1", "placement.mode=colocated"),
        (
            machine(2),
            ("placement.mode=disaggregated", "rollout.workers=0"),
            "keeps the engine in the learner's process",
            "leave rollout.workers out",
        ),
        (
            machine(2),
            ("placement.mode=disaggregated", "vllm.tensor_parallel=2"),
            "leave none for the learner",
            "vllm.tensor_parallel=1",
        ),
        (machine(2), ("placement.gpus=4",), "this machine has 2", "--gpus 2"),
        (machine(2), ("placement.gpus=3",), "not whole machines of 2 GPUs", "--gpus 2"),
        (machine(0), ("placement.gpus=1",), "torch sees no GPU", "CUDA build"),
        (machine(2), ("placement.gpus=2", "run.device=cpu"), "run.device", "leave --gpus out"),
        (machine(2, extras=("vllm",)), (), "need DeepSpeed, which is not installed", "spearrl[deepspeed]"),
        (machine(8, ranks=8, local_ranks=4, extras=EXTRAS[:2]), (), "rollout.launcher=processes", "spearrl[ray]"),
        (
            machine(8, ranks=16, local_ranks=8),
            (),
            "16 learner processes and 1 engine of 1 GPU do not fit disaggregated on 16 GPUs",
            "--nproc_per_node 4",
        ),
        (
            machine(8, ranks=16, local_ranks=8),
            ("placement.mode=colocated",),
            "placement.mode=colocated on 2 machines",
            "placement.mode=disaggregated",
        ),
        (
            machine(8, ranks=9, local_ranks=9),
            (),
            "a launcher started 9 ranks on a machine of 8 GPUs",
            "--nproc_per_node 8",
        ),
        (
            machine(8),
            ("placement.gpus=16", "rollout.launcher=ray", "learner.processes=12"),
            "this machine has 8 GPUs",
            "torchrun --nnodes 2",
        ),
        (
            machine(4, ranks=4, local_ranks=4),
            ("learner.processes=2",),
            "a launcher started 4 ranks",
            "learner.processes=4",
        ),
        (
            machine(4, ranks=4, local_ranks=4),
            ("learner.backend=local",),
            "learner.backend=local works alone",
            "learner.backend=deepspeed",
        ),
        (imagined(16), ("vllm.tensor_parallel=16",), "leave none for the learner", "vllm.tensor_parallel=1"),
    ],
)
def test_contradictions_name_the_fix(host, settings, message, fix):
    changes = ("placement.gpus=16", *settings) if not host.present else settings
    with pytest.raises(ConfigError) as error:
        placed(host, *changes)
    assert message in str(error.value) and fix in str(error.value.hint)


def test_what_does_not_fit_is_told():
    huge = placed(machine(2), parameters=30 * QWEN_1_5B)
    assert any("more GPUs, or learner.offload" in note or "larger vllm.tensor_parallel" in note for note in huge.notes)
    assert (
        placed(machine(1), "learner.offload=optimizer", "learner.backend=deepspeed").resident
        < placed(machine(1)).resident / 3
    )


def test_explicit_settings_win():
    placement = placed(machine(8), "rollout.engine=local", "learner.processes=4", "vllm.memory_fraction=0.3")
    assert (
        placement.config.rollout.engine == "local"
        and placement.config.learner.processes == 4
        and placement.config.vllm.memory_fraction == 0.3
    )
    assert placed(machine(2), "vllm.memory_fraction=0.3").derived.keys() == {
        "rollout.engine",
        "learner.backend",
        "learner.processes",
        "rollout.workers",
    }
    again = place(placement.config, machine(8))  # a saved config sets everything: the same GPUs for the same parts
    assert (again.learner, again.engines, again.derived) == (placement.learner, placement.engines, {})


def test_arithmetic_spells_out_the_batch():
    windowed = arithmetic(placed(machine(8)).config)
    assert "32 tasks x 8 siblings = 256 episodes = 256 to 3840 rows (a row a turn)" in windowed
    assert "1 to 15 optimiser steps of 256 rows, 32 a rank" in windowed
    chat = arithmetic(placed(machine(0), preset="tiny").config)
    assert (
        "8 tasks x 8 siblings = 64 episodes = 64 rows (a row an episode)" in chat
        and "2 optimiser steps of 32 rows" in chat
        and "a rank" not in chat
    )


def test_show_prints_who_gets_what(capsys):
    assert main(["config", "show", "--preset", "webshop-1.5b", "--gpus", "8", "--why"]) == 0
    shown = capsys.readouterr()
    assert "processes = 8  # placement" in shown.out and tomllib.loads(shown.out)["placement"]["gpus"] == 8
    assert "8 x 1 GPU    GPUs 0-7 " in shown.err and "the memory of these GPUs is unknown here" in shown.err
    assert (
        main(["config", "show", "--gpus", "3", "vllm.tensor_parallel=2"]) == 2
        and "use --gpus 2" in capsys.readouterr().err
    )
    assert main(["config", "show", "--gpus", "0"]) == 2 and "run.device=cpu" in capsys.readouterr().err
    assert main(["config", "show", "--gpus", "2", "placement.gpus=4"]) == 2
    assert "placement.gpus is given twice, as 4 and as 2" in capsys.readouterr().err


def test_devices(tmp_path):
    assert visible([1, 0], {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}) == {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a"}
    assert visible([2], {}) == {"CUDA_VISIBLE_DEVICES": "2"} and visible([], {}) == {}
    assert (
        detect({}).ranks == 0 and detect({"WORLD_SIZE": "4"}).ranks == 0
    )  # WORLD_SIZE alone: a batch system's, not a launcher's
    host = detect({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert (host.ranks, host.local_ranks) == (4, 2) and detect(
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}
    ).local_ranks == 4
    assert len(imagined(16).gpus) == 8 and len(imagined(6).gpus) == 6
    header = json.dumps(
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [3, 5]}, "b": {"dtype": "F32", "shape": []}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert parameters_of(str(tmp_path)) == 16 and parameters_of("tiny") == 0


def test_other_ranks_serve_and_the_trainer_does_not(monkeypatch):
    import spearrl.learner

    monkeypatch.setattr(spearrl.learner, "serve", lambda: 7, raising=False)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert (
            serve_rank({}) is None
            and serve_rank({"RANK": "0", "WORLD_SIZE": "2"}) is None
            and not under_launcher({"WORLD_SIZE": "2"})
        )
        assert serve_rank({"RANK": "1", "WORLD_SIZE": "2"}) == 7 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.signal(signal.SIGINT, before)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["train", "--env", "no.such:Thing"]) == 7  # the trainer's rank complains, once
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_learner_gives_its_memory_back_before_engines_wake():
    """What torch keeps of an update's activations may be all that an engine gave back."""
    order: list[str] = []

    class All:
        """Learner, engine and bridge in one."""

        def __getattr__(self, name: str):
            return lambda *_: order.append(name)

    every = All()
    for host, expected in ((machine(1), ["release", "wake", "publish"]), (machine(0), ["publish"])):
        order.clear()
        Assembly(None, every, Players(None, None, [every]), every, placed(host)).publish(1)
        assert order == expected
