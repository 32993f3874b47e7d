"""The rules an environment keeps, one function each: a returned text says what was found, BrokenRule what is wrong, Advice what may disappoint."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from spearrl.envs.check.guards import GlobalRandom, no_network
from spearrl.envs.check.samples import HOSTILE
from spearrl.envs.check.subject import (
    TURNS,
    BrokenRule,
    Episode,
    Moment,
    Subject,
    check_messages,
    demand,
    difference,
    short,
    stable,
)
from spearrl.envs.pool import open_pool
from spearrl.envs.tool import ToolEnvironment
from spearrl.errors import ConfigError, ContractError, EnvironmentFault
from spearrl.processes import child_environment
from spearrl.types import Action, Outcome, Reply, Task

PLAYED, EXPERT_TASKS, MOST_TURNS = 3, 12, 1000
SLOW_STEP_S, SLOW_SPAWN_S = 0.05, 0.2
CHILD_S = 120


class Advice(BrokenRule):
    """It runs, and may disappoint."""


class NotApplicable(Exception):
    """The rule has nothing to look at here."""


def tasks(subject: Subject) -> str:
    """Ids are unique, and the same in every instance."""
    counts: list[str] = []
    seen: dict[str, str] = {}
    other = subject.build()
    for split in subject.splits:
        try:
            found = subject.call(f"tasks({split!r})", lambda split=split: subject.root.tasks(split))  # type: ignore[misc]
        except ConfigError as error:
            if split == "train" or subject.demanded:
                raise BrokenRule(
                    f"no split {split!r}: {error.message}", error.hint or "name a split the environment has"
                ) from error
            counts.append(f"no split {split!r}")
            continue
        sound = len(found) and all(isinstance(task, Task) for task in found)
        demand(
            sound,
            f"{len(found)} tasks, not all of them spearrl.types.Task",
            "return a non-empty list of Task(id, split, data)",
        )
        ids = [task.id for task in found]
        double = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
        demand(
            double is None,
            f"the task id {double!r} occurs {ids.count(double)} times",
            "give every task of a split an id of its own",
        )  # type: ignore[arg-type]
        sound = all(isinstance(task.id, str) and task.split == split for task in found)
        demand(sound, "a task's id is no text, or its split is another", f"use Task(str id, {split!r}, data)")
        again = all([task.id for task in env.tasks(split)] == ids for env in (subject.root, other))
        demand(
            again, "a second call, or another instance, gives other tasks", "make tasks() depend on the options only"
        )
        shared = min(set(ids) & set(seen), default="")
        demand(
            not shared,
            f"the task {shared!r} is in {seen.get(shared)!r} and in {split!r}",
            "give tasks of different splits different ids",
        )
        seen.update(dict.fromkeys(ids, split))
        counts.append(f"{split} {len(ids)}")
        subject.played += [task for task in found[:PLAYED] if len(subject.played) < 2 * PLAYED]
    return ", ".join(counts) + "; ids unique and stable"


def unknown_split(subject: Subject) -> str:
    """A mistyped split is told from an empty one."""
    try:
        found = subject.call("tasks('no-such-split')", lambda: subject.root.tasks("no-such-split"))
    except ConfigError:
        return "a split that does not exist is refused with a ConfigError"
    raise BrokenRule(
        f"tasks('no-such-split') returned {len(found)} tasks",
        "raise spearrl.errors.ConfigError for a split you do not have",
    )


def episode(subject: Subject) -> str:
    """Records, prompts and schemas have their types, over whole episodes."""
    env, turns = subject.spawn(), 0
    for task in subject.played:
        running = subject.start(env, task)
        while True:
            prompt = subject.call(
                f"messages, task {task.id}", lambda r=running: env.messages(r.observation, len(r.moments) - 1)
            )  # type: ignore[misc]
            check_messages(prompt, "messages()")
            window = subject.call(f"window, task {task.id}", lambda r=running: env.window([], r.observation, r.task))  # type: ignore[misc]
            if window is not None:
                check_messages(window, "window()")
            if running.over or len(running.moments) > env.max_turns:
                break
            running.turn()
        turns += len(running.moments) - 1
    schemas = subject.call("tools", env.tools)
    sound = isinstance(schemas, list) and all(isinstance(s, dict) and s.get("type") == "function" for s in schemas)
    demand(sound, f"tools() returned {short(repr(schemas))}", 'return a list of {"type": "function", "function": {…}}')
    json.dumps(schemas)
    text = f"{len(subject.played)} episodes, {turns} turns: finite rewards, sound outcomes and prompts"
    if not isinstance(env, ToolEnvironment):
        return text
    if not subject.tool_calls:
        raise Advice(
            f"{text}; but no valid tool call could be made from the schemas, so no tool was tried",
            "write expert(): its calls are played",
        )
    return f"{text}; {subject.tool_calls} valid tool calls"


def max_turns(subject: Subject) -> str:
    """The limit is a number that an episode can use."""
    value = subject.root.max_turns
    demand(
        type(value) is int and 1 <= value <= MOST_TURNS,
        f"max_turns is {value!r}",
        f"set it to a whole number from 1 to {MOST_TURNS}",
    )
    return f"max_turns {value}"


def determinism(subject: Subject) -> str:
    """One seed, one episode."""
    for task in subject.played:
        first, second = (subject.play(env, task, subject.seed) for env in (subject.spawn(), subject.build()))
        _equal(
            first,
            second,
            task,
            subject.seed,
            "draw everything in reset and step from random.Random(seed), and start every episode afresh in reset()",
        )
        env = subject.spawn()
        subject.play(env, subject.played[-1], subject.seed + 1)
        _equal(
            first,
            subject.play(env, task, subject.seed),
            task,
            subject.seed,
            "reset() must leave nothing over from the episode before",
        )
    others = {tuple(subject.play(subject.spawn(), subject.played[0], subject.seed + n)) for n in range(4)}
    return "the same seed gives the same episode; " + (
        "other seeds differ" if len(others) > 1 else "other seeds give the same one"
    )


def processes(subject: Subject) -> str:
    """One seed, one episode, in every process: Python hashes text differently in each."""
    ask = {
        "name": subject.name,
        "options": subject.options,
        "max_turns": subject.max_turns,
        "splits": subject.splits,
        "seed": subject.seed,
        "deadline_s": subject.deadline_s,
    }
    found = []
    for number in ("1", "2"):
        command = [sys.executable, "-c", "from spearrl.envs.check.check import print_traces; print_traces()"]
        settings = {**child_environment(), "PYTHONHASHSEED": number}
        run = subprocess.run(
            command,
            input=json.dumps(ask, default=str),
            capture_output=True,
            text=True,
            env=settings,
            timeout=CHILD_S,
            check=False,
        )
        failed = f"it does not run in a fresh process: {run.stderr.strip()[-300:]}"
        demand(not run.returncode, failed, "make the class importable, and its options plain values")
        found.append(json.loads(run.stdout.splitlines()[-1]))
    same = found[0]["tasks"] == found[1]["tasks"]
    demand(
        same,
        "two processes list other tasks, or in another order",
        "sort what comes from a set, a dict of sets or a folder listing",
    )
    for task, first, second in zip(found[0]["ids"], found[0]["traces"], found[1]["traces"], strict=True):
        where = difference([Moment(*m) for m in first], [Moment(*m) for m in second])
        demand(
            not where,
            f"two processes differ on task {task}, {where}",
            "sort what comes from a set; do not use hash(), id() or the time",
        )
    return "two fresh processes play the same episodes"


def task_data(subject: Subject) -> str:
    """Tasks are shared by all slots."""
    for task in subject.played:
        before = copy.deepcopy(dict(task.data))
        subject.play(subject.spawn(), task, subject.seed)
        demand(
            dict(task.data) == before,
            f"an episode changed the data of task {task.id}",
            "copy task.data in reset() before changing it",
        )
    return "episodes leave the tasks as they are"


def after_end(subject: Subject) -> str:
    """The end is the end: no further reward, no crash."""
    seen = 0
    for task, scripted in itertools.product(subject.played, (False, True)):
        env = subject.spawn()
        env.expert_noise = 0.0 if scripted else env.expert_noise
        running = subject.start(env, task).finish(scripted=scripted)
        if not running.over or running.moments[-1].ended != "terminated":
            continue
        seen += 1
        for action in (Action("again"), running.action):
            try:
                outcome = subject.step(env, action, f" after the end of task {task.id}")
            except ContractError:
                continue
            quiet = outcome.reward == 0 and (outcome.terminated or outcome.truncated)
            wrong = f"a step after the end gave reward {outcome.reward} and terminated={outcome.terminated}"
            demand(
                quiet,
                wrong,
                "return Outcome(observation, 0.0, True, …) or raise ContractError once the episode is over",
            )
    if not seen:
        raise NotApplicable(
            "no episode terminated within max_turns, by chance or by the expert: a step after the end was not tried"
        )
    return "a step after the end pays nothing"


def hostile(subject: Subject) -> str:
    """The model may say anything."""
    for name, text in HOSTILE.items():
        env = subject.spawn()
        subject.reset(env, subject.played[0], subject.seed)
        for action in (subject.parse(env, text), Action(text), Action(text, valid=False)):
            outcome = subject.step(env, action, f" of a hostile reply ({name})")
            if outcome.terminated or outcome.truncated:
                subject.reset(env, subject.played[0], subject.seed)
    return f"{len(HOSTILE)} hostile replies (empty, huge, not Unicode, …) were taken calmly"


def parse_format(subject: Subject) -> str:
    """What the expert writes is what the environment reads."""
    env, count = subject.spawn(), 0
    for task in subject.played:
        running = subject.start(env, task)
        for _ in range(subject.root.max_turns):
            wanted = [text for text in (subject.expert(env),) if text is not None] + list(
                (running.observation.admissible or ())[:50]
            )
            for text in wanted:
                reply = subject.call(f"format({short(text)})", lambda text=text: env.format(text))  # type: ignore[misc]
                action = subject.parse(env, reply)
                seen = f"parse(format({short(text)})) is {short(action.text)}, valid={action.valid}"
                fix = "make format() the inverse of parse(): the cold start and hand play write replies with it"
                demand(action.text == text and action.valid, seen, fix)
                count += 1
            running.turn()
            if running.over:
                break
    if not count:
        raise NotApplicable("neither an expert nor admissible actions to write")
    return f"parse() reads back all of {count} formatted actions"


def spawn(subject: Subject) -> str:
    """Slots share read-only data and nothing else."""
    task, other = subject.played[0], subject.played[-1]
    start = time.perf_counter()
    slot = subject.spawn()
    seconds = time.perf_counter() - start
    shown = "itself" if slot is subject.root else type(slot).__name__
    demand(
        slot is not subject.root and isinstance(slot, type(subject.root)),
        f"spawn() returned {shown}",
        "return another instance of the class",
    )
    alone = subject.play(subject.spawn(), task, subject.seed), subject.play(subject.spawn(), other, subject.seed + 1)
    runs = subject.start(slot, task), Episode(subject, subject.spawn(), other, subject.seed + 1)
    for turns in range(1, TURNS + 1):
        for run in runs:
            run.finish(turns)
    for run, wanted in zip(runs, alone, strict=True):
        where = difference(wanted, run.moments)
        fix = "keep an episode's state on self, not on the class"
        demand(not where, f"two slots played at once disturb each other: task {run.task.id}, {where}", fix)
    subject.call("close", slot.close)
    _equal(
        alone[1],
        subject.play(runs[1].env, other, subject.seed + 1),
        other,
        subject.seed + 1,
        "close() of one slot must not close what others share",
    )
    if seconds > SLOW_SPAWN_S:
        seen = f"spawn() takes {seconds:.2f} s, and there is one for every episode at once"
        raise Advice(seen, "override spawn() to share loaded data: slot = copy.copy(self)")
    return "slots are independent"


def close(subject: Subject) -> str:
    """close() may come twice, and before any episode."""
    for what in ("close, before any episode", "close"):
        env = subject.build()
        if what == "close":
            subject.reset(env, subject.played[0], subject.seed)
        for _ in range(2):
            subject.call(what, env.close)
    return "close() may be called twice"


def global_random(subject: Subject) -> str:
    """The global generators belong to the run."""
    for what, function in (
        ("reset() or step()", lambda: [subject.play(subject.spawn(), task, subject.seed) for task in subject.played]),
        ("__init__()", subject.build),
    ):
        state = GlobalRandom()
        function()
        touched = state.touched()
        state.restore()
        seen = f"{what} draws from, or seeds, the global generator of {' and '.join(touched)}"
        demand(not touched, seen, "use a generator of your own: random.Random(seed)")
    return "no global random state is touched"


def network(subject: Subject) -> str:
    """An episode depends on its seed, not on a server."""
    with no_network() as tried:
        try:
            for task in subject.played:
                subject.play(subject.spawn(), task, subject.seed)
        except OSError:
            if not tried:
                raise
    if tried:
        seen = f"an episode reaches for the network: {tried[0]}"
        if subject.root.execution == "inline":
            raise BrokenRule(
                seen, 'load what it needs before, or set execution="thread" so that waiting does not stop the run'
            )
        raise Advice(seen, "runs of it cannot be repeated exactly; answer from local data where you can")
    return "no connection is tried"


def expert(subject: Subject) -> str:
    """A scripted expert, where there is one, wins."""
    env = subject.spawn()
    env.expert_noise = 0.0
    found, most = subject.root.tasks(subject.played[0].split)[:EXPERT_TASKS], 0
    for task in found:
        observation, outcome = subject.reset(env, task, subject.seed), None
        for turn in range(env.max_turns):
            wanted = subject.expert(env)
            if wanted is None:
                if turn == 0:
                    raise NotApplicable(
                        "no expert: a cold start is not possible, training needs a model that can play already"
                    )
                break
            outcome = subject.step(
                env, subject.parse(env, env.format(wanted)), f", task {task.id}, expert's turn {turn}"
            )
            observation, most = outcome.observation, max(most, turn + 1)
            if outcome.terminated or outcome.truncated:
                break
        seen = f"the expert does not win task {task.id} in {env.max_turns} turns; it ended at {short(observation.text, 80)}"
        demand(outcome is not None and outcome.info.get("success"), seen, "mend expert(), or raise max_turns")
    env.expert_noise = 1.0
    running = subject.start(env, found[0])
    while not running.over and len(running.moments) <= env.max_turns and subject.expert(env) is not None:
        running.turn()
    return f"the expert wins {len(found)} of {len(found)} tasks in at most {most} turns"


def anchors(subject: Subject) -> str:
    """GiGPO groups turns by equal anchors."""
    env, given = subject.spawn(), set()
    for task in subject.played:
        running = subject.start(env, task)
        while not running.over and len(running.moments) <= env.max_turns:
            anchor = running.observation.anchor
            try:
                hash(anchor)
                given.add(stable(anchor))
            except (TypeError, ContractError) as error:
                raise BrokenRule(
                    f"an anchor is {short(repr(anchor))}: {error}", "use text, a number, or tuples of these"
                ) from error
            running.turn()
    if given == {"None"}:
        return "no anchors: GiGPO will group by the observation's text"
    return f"{len(given)} different anchor states"


def off_loop(subject: Subject) -> str:
    """What leaves a worker must survive the way."""
    kind = subject.root.execution
    if kind == "inline":
        raise NotApplicable("it runs on the event loop")
    pool = open_pool(subject.root, style="chat", workers=1, deadline_s=subject.deadline_s, deterministic=True)
    task = subject.played[0]
    subject.at = f"{subject.cls.__name__} in a {kind} pool"

    async def play() -> Outcome:
        slot = pool.acquire()
        await pool.start(slot, task, subject.seed)
        return (await pool.act(slot, Reply("go on", (1,), "stop"), False)).outcome

    try:
        pickle.dumps(task)
        asyncio.run(play())
    except (EnvironmentFault, ConfigError, ContractError, pickle.PicklingError, AttributeError, TypeError) as error:
        raise BrokenRule(
            f"it does not run in a {kind} pool: {error}",
            "keep the class importable; put plain values into tasks, anchors and info",
        ) from error
    finally:
        pool.close()
    return f'it runs in a pool (execution="{kind}")'


def speed(subject: Subject) -> str:
    """Time of a step, over everything that was played."""
    median, worst = statistics.median(subject.step_seconds), max(subject.step_seconds)
    reset = statistics.median(subject.reset_seconds)
    text = f"step {_time(median)} median, {_time(worst)} at most; reset {_time(reset)} median"
    if median > SLOW_STEP_S and subject.root.execution == "inline":
        raise Advice(
            f"{text}; all other episodes wait for it",
            'set execution="process" where it computes, "thread" where it waits',
        )
    return text


RULES: tuple[Callable[[Subject], str], ...] = (
    tasks,
    unknown_split,
    max_turns,
    episode,
    determinism,
    processes,
    task_data,
    after_end,
    hostile,
)
RULES += (parse_format, spawn, close, global_random, network, expert, anchors, off_loop, speed)


def _equal(first: list[Moment], second: list[Moment], task: Task, seed: int, fix: str) -> None:
    where = difference(first, second)
    demand(not where, f"task {task.id} with seed {seed}, played twice, differs at {where}", fix)


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.1f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )
