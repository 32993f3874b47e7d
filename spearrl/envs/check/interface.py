"""The rules about what an environment's methods take and return.

A rule is a function: the text it returns says what was found; BrokenRule says what is wrong, or may disappoint.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from functools import partial
from typing import Any

from spearrl.envs.check.checked_environment import (
    BrokenRule,
    CheckedEnvironment,
    check_messages,
    require,
    shortened,
)
from spearrl.envs.check.samples import HOSTILE
from spearrl.envs.tool import ToolEnvironment
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Action, Task

PLAYED, EXPERT_TASKS, MOST_TURNS = 3, 12, 1000


def tasks(checked: CheckedEnvironment) -> str:
    """Ids are unique, and the same in every instance."""
    counts: list[str] = []
    split_of: dict[str, str] = {}
    other = checked.build()
    for split in checked.splits:
        try:
            listed = checked.call(f"tasks({split!r})", partial(checked.root.tasks, split))
        except ConfigError as error:
            if split == "train" or checked.all_splits:
                fix = error.hint or "name a split the environment has"
                raise BrokenRule(f"no split {split!r}: {error.message}", fix) from error
            counts.append(f"no split {split!r}")
            continue
        sound = len(listed) and all(isinstance(task, Task) for task in listed)
        fix = "return a non-empty list of Task(id, split, data)"
        require(sound, f"{len(listed)} tasks, not all of them spearrl.types.Task", fix)
        ids = [task.id for task in listed]
        task_id, times = Counter(ids).most_common(1)[0]
        fix = "give every task of a split an id of its own"
        require(times == 1, f"the task id {task_id!r} occurs {times} times", fix)
        sound = all(isinstance(task.id, str) and task.split == split for task in listed)
        require(sound, "a task's id is no text, or its split is another", f"use Task(str id, {split!r}, data)")
        again = all([task.id for task in env.tasks(split)] == ids for env in (checked.root, other))
        fix = "make tasks() depend on the options only"
        require(again, "a second call, or another instance, gives other tasks", fix)
        shared = min(set(ids) & set(split_of), default="")
        seen = f"the task {shared!r} is in {split_of.get(shared)!r} and in {split!r}"
        require(not shared, seen, "give tasks of different splits different ids")
        split_of.update(dict.fromkeys(ids, split))
        counts.append(f"{split} {len(ids)}")
        if len(checked.played) < 2 * PLAYED:
            checked.played += listed[:PLAYED]
    return ", ".join(counts) + "; ids unique and stable"


def unknown_split(checked: CheckedEnvironment) -> str:
    """A mistyped split is told from an empty one."""
    try:
        listed = checked.call("tasks('no-such-split')", partial(checked.root.tasks, "no-such-split"))
    except ConfigError:
        return "a split that does not exist is refused with a ConfigError"
    fix = "raise spearrl.errors.ConfigError for a split you do not have"
    raise BrokenRule(f"tasks('no-such-split') returned {len(listed)} tasks", fix)


def max_turns(checked: CheckedEnvironment) -> str:
    """The limit is a number that an episode can use."""
    turns = checked.root.max_turns
    fix = f"set it to a whole number from 1 to {MOST_TURNS}"
    require(type(turns) is int and 1 <= turns <= MOST_TURNS, f"max_turns is {turns!r}", fix)
    return f"max_turns {turns}"


def episode(checked: CheckedEnvironment) -> str:
    """Records, prompts and schemas have their types, over whole episodes."""
    env, turns = checked.spawn(), 0
    for running in checked.turns(env):
        observation, task = running.observation, running.task
        prompt = partial(env.messages, observation, len(running.records) - 1)
        check_messages(checked.call(f"messages, task {task.id}", prompt), "messages()")
        window = checked.call(f"window, task {task.id}", partial(env.window, [], observation, task))
        if window is not None:
            check_messages(window, "window()")
        seen, fix = "an observation holds pictures, and shows_images is False", "set shows_images = True on the class"
        require(not observation.images or env.shows_images, seen, fix)
        turns += 1
    schemas = checked.call("tools", env.tools)
    sound = isinstance(schemas, list) and all(isinstance(s, dict) and s.get("type") == "function" for s in schemas)
    fix = 'return a list of {"type": "function", "function": {…}}'
    require(sound, f"tools() returned {shortened(schemas)}", fix)
    json.dumps(schemas)
    text = f"{len(checked.played)} episodes, {turns} turns: finite rewards, sound outcomes and prompts"
    if not isinstance(env, ToolEnvironment):
        return text
    seen = f"{text}; but no valid tool call could be made from the schemas, so no tool was tried"
    require(checked.tool_calls, seen, "write expert(): its calls are played", "warn")
    return f"{text}; {checked.tool_calls} valid tool calls"


def after_end(checked: CheckedEnvironment) -> str:
    """The end is the end: no further reward, no crash."""
    terminated = 0
    for task, scripted in itertools.product(checked.played, (False, True)):
        env = checked.spawn()
        env.expert_noise = 0.0 if scripted else env.expert_noise
        running = checked.start(env, task).finish(scripted=scripted)
        if running.records[-1]["ended"] != "terminated":
            continue
        terminated += 1
        for action in (Action("again"), running.action):
            try:
                outcome = checked.step(env, action, f" after the end of task {task.id}")
            except ContractError:
                continue
            seen = f"a step after the end gave reward {outcome.reward} and terminated={outcome.terminated}"
            fix = "return Outcome(observation, 0.0, True, …) or raise ContractError once the episode is over"
            require(outcome.reward == 0 and (outcome.terminated or outcome.truncated), seen, fix)
    words = "no episode terminated within max_turns, by chance or by the expert: a step after the end was not tried"
    require(terminated, words, "", "skip")
    return "a step after the end pays nothing"


def hostile(checked: CheckedEnvironment) -> str:
    """The model may say anything."""
    for name, text in HOSTILE.items():
        env = checked.spawn()
        checked.reset(env, checked.played[0], checked.seed)
        for action in (checked.parse(env, text), Action(text), Action(text, valid=False)):
            outcome = checked.step(env, action, f" of a hostile reply ({name})")
            if outcome.terminated or outcome.truncated:
                checked.reset(env, checked.played[0], checked.seed)
    return f"{len(HOSTILE)} hostile replies (empty, huge, not Unicode, …) were taken calmly"


def parse_format(checked: CheckedEnvironment) -> str:
    """What the expert writes is what the environment reads."""
    env, count = checked.spawn(), 0
    for running in checked.turns(env):
        expert_text = checked.expert(env)
        texts = [] if expert_text is None else [expert_text]
        for text in [*texts, *(running.observation.admissible or ())[:50]]:
            reply = checked.call(f"format({shortened(text)})", partial(env.format, text))
            action = checked.parse(env, reply)
            seen = f"parse(format({shortened(text)})) is {shortened(action.text)}, valid={action.valid}"
            fix = "make format() the inverse of parse(): the cold start and hand play write replies with it"
            require(action.text == text and action.valid, seen, fix)
            count += 1
    require(count, "neither an expert nor admissible actions to write", "", "skip")
    return f"parse() reads back all of {count} formatted actions"


def expert(checked: CheckedEnvironment) -> str:
    """A scripted expert, where there is one, wins."""
    env = checked.spawn()
    env.expert_noise = 0.0
    listed, most = checked.root.tasks(checked.played[0].split)[:EXPERT_TASKS], 0
    for task in listed:
        running = checked.start(env, task)
        while running.goes_on() and (text := checked.expert(env)) is not None:
            running.play(text)
        turns, last = len(running.records) - 1, running.records[-1]
        words = "no expert: a cold start is not possible, training needs a model that can play already"
        require(turns, words, "", "skip")
        seen = f"the expert does not win task {task.id} in {env.max_turns} turns; it ended at "
        seen += shortened(last["text"], 80)
        require(last["success"] == "True", seen, "mend expert(), or raise max_turns")
        most = max(most, turns)
    env.expert_noise = 1.0
    running = checked.start(env, listed[0])
    while running.goes_on() and checked.expert(env) is not None:
        running.turn()
    return f"the expert wins {len(listed)} of {len(listed)} tasks in at most {most} turns"


def anchors(checked: CheckedEnvironment) -> str:
    """GiGPO groups turns by equal anchors."""
    different = set()
    for running in checked.turns(checked.spawn()):
        anchor = running.observation.anchor
        try:
            hash(anchor)
            different.add(anchor if anchor is None or isinstance(anchor, str) else _as_the_trainer_compares(anchor))
        except (TypeError, ContractError) as error:
            seen = f"an anchor is {shortened(anchor)}: {error}"
            raise BrokenRule(seen, "use text, a number, or tuples of these") from error
    if different == {None}:
        return "no anchors: GiGPO will group by the observation's text"
    return f"{len(different)} different anchor states"


def _as_the_trainer_compares(anchor: Any) -> str:
    from spearrl.batching.anchors import canonical  # loads torch, which an anchor of text does not need

    return repr(canonical(anchor))
