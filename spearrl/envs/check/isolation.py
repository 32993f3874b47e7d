"""The rules about what an episode may depend on, and what it may change.

An episode depends on its task and seed alone: not on the process, the global random state, the network or other slots.
"""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import statistics
import subprocess
import sys
from contextlib import suppress

from spearrl.envs.check.checked_environment import (
    TURNS,
    BrokenRule,
    CheckedEnvironment,
    first_difference,
    require,
)
from spearrl.envs.check.guards import GlobalRandom, no_network
from spearrl.envs.check.interface import tasks
from spearrl.envs.pool import open_pool
from spearrl.errors import ConfigError, ContractError, EnvironmentFault
from spearrl.processes import child_environment
from spearrl.types import Outcome, Reply

SLOW_STEP_S, SLOW_SPAWN_S = 0.05, 0.2
CHILD_S = 120
REQUEST = ("name", "options", "max_turns", "splits", "seed", "deadline_s")  # what `traces` is told


def determinism(checked: CheckedEnvironment) -> str:
    """One seed, one episode."""
    last, seed = checked.played[-1], checked.seed
    for task in checked.played:
        first, second = (checked.play(env, task) for env in (checked.spawn(), checked.build()))
        fix = "draw everything in reset and step from random.Random(seed), and start every episode afresh in reset()"
        _require_equal(first, second, f"task {task.id} with seed {seed}", fix)
        env = checked.spawn()
        checked.play(env, last, seed + 1)
        fix = "reset() must leave nothing over from the episode before"
        _require_equal(first, checked.play(env, task), f"task {task.id} with seed {seed}", fix)
    others = {str(checked.play(checked.spawn(), checked.played[0], seed + n)) for n in range(4)}
    return f"the same seed gives the same episode; other seeds {'differ' if len(others) > 1 else 'give the same one'}"


def processes(checked: CheckedEnvironment) -> str:
    """One seed, one episode, in every process: Python hashes text differently in each."""
    request = {name: getattr(checked, name) for name in REQUEST}
    answers = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", f"from {__name__} import traces; traces()"]
        env = {**child_environment(), "PYTHONHASHSEED": hash_seed}
        told = json.dumps(request, default=str)
        child = subprocess.run(command, input=told, capture_output=True, text=True, env=env, timeout=CHILD_S)
        seen = f"it does not run in a fresh process: {child.stderr.strip()[-300:]}"
        require(not child.returncode, seen, "make the class importable, and its options plain values")
        answers.append(json.loads(child.stdout.splitlines()[-1]))
    one, other = answers
    fix = "sort what comes from a set, a dict of sets or a folder listing"
    require(one["tasks"] == other["tasks"], "two processes list other tasks, or in another order", fix)
    for task_id, *traces in zip(one["ids"], one["traces"], other["traces"], strict=True):
        where = first_difference(*traces)
        fix = "sort what comes from a set; do not use hash(), id() or the time"
        require(not where, f"two processes differ on task {task_id}, {where}", fix)
    return "two fresh processes play the same episodes"


def traces() -> None:
    """Play the tasks of a request, JSON on standard input, and print ids and episodes as one line of JSON."""
    request = json.load(sys.stdin)
    output, sys.stdout = sys.stdout, sys.stderr  # an environment may print
    checked = CheckedEnvironment(**request)
    with suppress(BrokenRule):  # the rule `tasks` has said it already
        tasks(checked)
    splits = dict.fromkeys(task.split for task in checked.played)
    answer = {
        "tasks": [[task.id for task in checked.root.tasks(split)][:1000] for split in splits],
        "ids": [task.id for task in checked.played],
        "traces": [checked.play(checked.spawn(), task) for task in checked.played],
    }
    output.write(json.dumps(answer) + "\n")


def task_data(checked: CheckedEnvironment) -> str:
    """Tasks are shared by all slots."""
    for task in checked.played:
        before = copy.deepcopy(dict(task.data))
        checked.play(checked.spawn(), task)
        fix = "copy task.data in reset() before changing it"
        require(dict(task.data) == before, f"an episode changed the data of task {task.id}", fix)
    return "episodes leave the tasks as they are"


def spawn(checked: CheckedEnvironment) -> str:
    """Slots share read-only data and nothing else."""
    slot = checked.spawn()
    seconds = checked.seconds["spawn"][-1]
    returned = "itself" if slot is checked.root else type(slot).__name__
    sound = slot is not checked.root and isinstance(slot, type(checked.root))
    require(sound, f"spawn() returned {returned}", "return another instance of the class")
    played = (checked.played[0], checked.seed), (checked.played[-1], checked.seed + 1)
    alone = [checked.play(checked.spawn(), *episode) for episode in played]
    together = [checked.start(env, *episode) for env, episode in zip((slot, checked.spawn()), played, strict=True)]
    for turns in range(1, TURNS + 1):
        for running in together:
            running.finish(turns)
    for running, expected in zip(together, alone, strict=True):
        where = first_difference(expected, running.records)
        seen = f"two slots played at once disturb each other: task {running.task.id}, {where}"
        require(not where, seen, "keep an episode's state on self, not on the class")
    checked.call("close", slot.close)
    again = checked.play(together[1].env, *played[1])
    _require_equal(alone[1], again, "an episode", "close() of one slot must not close what others share")
    seen = f"spawn() takes {seconds:.2f} s, and there is one for every episode at once"
    fix = "override spawn() to share loaded data: slot = copy.copy(self)"
    require(seconds <= SLOW_SPAWN_S, seen, fix, "warn")
    return "slots are independent"


def close(checked: CheckedEnvironment) -> str:
    """close() may come twice, and before any episode."""
    for what in ("close, before any episode", "close"):
        env = checked.build()
        if what == "close":
            checked.reset(env, checked.played[0], checked.seed)
        for _ in range(2):
            checked.call(what, env.close)
    return "close() may be called twice"


def global_random(checked: CheckedEnvironment) -> str:
    """The global generators belong to the run."""
    for what, function in (("reset() or step()", checked.play_all), ("__init__()", checked.build)):
        state = GlobalRandom()
        function()
        touched = state.touched()
        state.restore()
        seen = f"{what} draws from, or seeds, the global generator of {' and '.join(touched)}"
        require(not touched, seen, "use a generator of your own: random.Random(seed)")
    return "no global random state is touched"


def network(checked: CheckedEnvironment) -> str:
    """An episode depends on its seed, not on a server."""
    with no_network() as tried:
        try:
            checked.play_all()
        except OSError:
            if not tried:
                raise
    if not tried:
        return "no connection is tried"
    waits = checked.root.execution != "inline"
    fix = 'load what it needs before, or set execution="thread" so that waiting does not stop the run'
    fix = "runs of it cannot be repeated exactly; answer from local data where you can" if waits else fix
    raise BrokenRule(f"an episode reaches for the network: {tried[0]}", fix, "warn" if waits else "fail")


def off_loop(checked: CheckedEnvironment) -> str:
    """What leaves a worker must survive the way."""
    kind = checked.root.execution
    require(kind != "inline", "it runs on the event loop", "", "skip")
    pool = open_pool(checked.root, style="chat", workers=1, deadline_s=checked.deadline_s, deterministic=True)
    task = checked.played[0]
    checked.last_call = f"{checked.cls.__name__} in a {kind} pool"

    async def play() -> Outcome:
        slot = pool.acquire()
        await pool.start(slot, task, checked.seed)
        return (await pool.act(slot, Reply("go on", (1,), "stop"), False)).outcome

    try:
        pickle.dumps(task)
        asyncio.run(play())
    except (EnvironmentFault, ConfigError, ContractError, pickle.PicklingError, AttributeError, TypeError) as error:
        fix = "keep the class importable; put plain values into tasks, anchors and info"
        raise BrokenRule(f"it does not run in a {kind} pool: {error}", fix) from error
    finally:
        pool.close()
    return f'it runs in a pool (execution="{kind}")'


def speed(checked: CheckedEnvironment) -> str:
    """Time of a step, over everything that was played."""
    steps, resets = checked.seconds["step"], checked.seconds["reset"]
    median = statistics.median(steps)
    text = f"step {_time(median)} median, {_time(max(steps))} at most; reset {_time(statistics.median(resets))} median"
    fix = 'set execution="process" where it computes, "thread" where it waits'
    slow = median > SLOW_STEP_S and checked.root.execution == "inline"
    require(not slow, f"{text}; all other episodes wait for it", fix, "warn")
    return text


def _require_equal(first: list[dict[str, str]], second: list[dict[str, str]], what: str, fix: str) -> None:
    where = first_difference(first, second)
    require(not where, f"{what}, played twice, differs at {where}", fix)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
