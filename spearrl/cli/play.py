"""spearrl play: one episode by hand, by the scripted expert or by a model, with everything the model sees."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, cast

from spearrl.cli.target import OVERRIDES_HELP, TARGET_HELP, config_of, model_of

if TYPE_CHECKING:
    from spearrl.config import RunConfig
    from spearrl.envs import Environment
    from spearrl.types import Message, Observation, Task, Trajectory

T = TypeVar("T")

STOPPED = "stopped"
SHOWN = 12  # admissible actions that are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="ENV", help=TARGET_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES_HELP)
    parser.add_argument("--task", metavar="ID", help="the task to play (default: the first of the split)")
    parser.add_argument("--split", default="train", help="the split the task is in (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episode (default: 0)")
    parser.add_argument(
        "--style", choices=("chat", "windowed"), help="how prompts are made (default: the config's env.style)"
    )
    parser.add_argument("--expert", action="store_true", help="the environment's scripted expert plays")
    parser.add_argument(
        "--model", metavar="DIR", help="a model plays: a run directory (its newest checkpoint) or a model directory"
    )
    parser.add_argument(
        "--raw", action="store_true", help="by hand: what you type is the whole reply, not the action in it"
    )
    parser.add_argument("--json", action="store_true", help="print the episode as one JSON object instead")


def run(args: argparse.Namespace) -> int:
    from spearrl.errors import ConfigError

    if args.expert and args.model:
        raise ConfigError(
            "--expert and --model are given; one of them can play", where="command line", hint="leave one out"
        )
    overrides = [*args.overrides, *([f"env.style={args.style}"] if args.style else [])]
    config = config_of(args.target, overrides, model=str(model_of(args.model)) if args.model else None)
    from spearrl import envs

    name = config.env.name
    environment = _of_environment(
        name, lambda: envs.instantiate(name, config.env.options, config.env.max_turns)
    )
    printer = _Printer(silent=args.json)
    task = _of_environment(name, lambda: _task(environment, args.split, args.task))
    printer.say(
        f"task {task.id} ({task.split}), seed {args.seed}, style {config.env.style}, at most {environment.max_turns} turns"
    )
    if args.model:
        record = _by_model(config, environment, task, args.seed, printer)
    else:
        record = _of_environment(
            f"{name}, task {task.id}, seed {args.seed}",
            lambda: _by_hand(environment, task, config.env.style, args, printer),
        )
    printer.say(f"{record['status']}: reward {record['reward']:g} in {len(record['turns'])} turns")
    if args.json:
        print(
            json.dumps(
                {"environment": config.env.name, "task": task.id, "split": task.split, "seed": args.seed, **record},
                default=str,
            )
        )
    return 0


def _of_environment(where: str, function: Callable[[], T]) -> T:
    """What the function returns. Raises ContractError, with the line it came from, for whatever an environment raises."""
    from spearrl.errors import ContractError, SpearError

    try:
        return function()
    except (SpearError, BrokenPipeError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ContractError(
            f"it raised {type(error).__name__}: {error}",
            where=f"{where} ({frame.filename}:{frame.lineno}, in {frame.name})",
            hint="mend that line; reset() and step() answer with what the model can read and do not raise. spearrl check-env tries it with many replies",
        ) from error


class _Printer:
    """Standard output, unless the result is asked for as JSON."""

    def __init__(self, *, silent: bool):
        self._silent = silent

    def say(self, text: str) -> None:
        if not self._silent:
            print(
                text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"),
                flush=True,
            )


def _task(environment: Environment, split: str, wanted: str | None) -> Task:
    from spearrl.errors import ConfigError

    tasks = environment.tasks(split)
    if not tasks:
        raise ConfigError(f"split {split!r} has no tasks", where="--split", hint="name a split the environment has")
    if wanted is None:
        return tasks[0]
    found = next((task for task in tasks if task.id == wanted), None)
    if found is None:
        import difflib

        near = difflib.get_close_matches(wanted, [task.id for task in tasks[:5000]], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {len(tasks)}, such as {tasks[0].id}"
        raise ConfigError(f"split {split!r} has no task {wanted[:80]!r}", where="--task", hint=hint)
    return found


def _by_hand(
    environment: Environment, task: Task, style: str, args: argparse.Namespace, printer: _Printer
) -> dict[str, Any]:
    """The episode of the person or the expert, through the same slot that the trainer uses."""
    from spearrl.envs.pool.slot import Slot
    from spearrl.types import Reply

    slot = Slot(environment, style)
    turns: list[dict[str, Any]] = []
    status = "turn_limit"
    try:
        shown = slot.start(task, args.seed)
        messages, observation = shown.messages, shown.observation
        for tool in shown.tools:
            printer.say(f"tool: {json.dumps(tool)}")
        for number in range(environment.max_turns):
            _show_turn(printer, number, environment.max_turns, messages)
            reply = _reply(environment, observation, args, printer)
            if reply is None:
                status = STOPPED
                break
            played = slot.act(Reply(reply, (), "stop"), number + 1 == environment.max_turns)
            outcome = played.outcome
            turns.append(_turn([[m.role, m.text] for m in messages], reply, played.action, outcome.reward))
            turns[-1]["pictures"] = sum(len(m.images) for m in messages)
            _show_action(printer, turns[-1])
            messages, observation = played.messages, outcome.observation
            if outcome.terminated or outcome.truncated:
                status = (
                    ("success" if outcome.info.get("success") else "failure") if outcome.terminated else "turn_limit"
                )
                printer.say(f"end: {observation.text}\ninfo: {json.dumps(dict(outcome.info), default=str)}")
                break
    finally:
        slot.close()
    return {"status": status, "reward": sum(turn["reward"] for turn in turns), "turns": turns}


def _reply(
    environment: Environment, observation: Observation, args: argparse.Namespace, printer: _Printer
) -> str | None:
    """What the player says; none at the end of input."""
    from spearrl.errors import ConfigError

    if args.expert:
        wanted = environment.expert()
        if wanted is None:
            raise ConfigError(
                f"{type(environment).__name__} has no scripted expert here",
                where="--expert",
                hint="play by hand, or with --model",
            )
        return environment.format(wanted)
    if observation.admissible:
        more = len(observation.admissible) - SHOWN
        printer.say(
            f"(possible: {' | '.join(observation.admissible[:SHOWN])}{f' | … {more} more' if more > 0 else ''})"
        )
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        return None
    text = line.rstrip("\n")
    return text if args.raw else environment.format(text)


def _by_model(config: RunConfig, environment: Environment, task: Task, seed: int, printer: _Printer) -> dict[str, Any]:
    """The episode of a model, through the trainer's own collector; prompts are shown with their control tokens."""
    from spearrl.launch.assembly import players_of
    from spearrl.launch.parts import make_collector, make_pool
    from spearrl.models import load_tokenizer, prepare_torch

    tokenizer = load_tokenizer(config.model.path)
    here = config.model_copy(update={"rollout": config.rollout.model_copy(update={"workers": 0})})
    with ExitStack() as stack:
        players = players_of(here, environment, prepare_torch(here), stack)
        engine, encoder = cast(Any, players.engine), cast(Any, players.evaluator).encoder
        # The collector derives a seed of its own; here the episode is the one that --seed names, as by hand.
        pool = make_pool(here, environment, episode_seed=seed)
        stack.callback(pool.close)
        sampling = (here.eval.temperature, here.eval.top_p)
        collector = make_collector(here, engine, encoder, pool, sampling=sampling)
        trajectory = collector.collect([task], 1, run_seed=seed, step=0, first_group_id=0, purpose="play")[
            0
        ].trajectories[0]
    turns = _model_turns(trajectory, tokenizer)
    for number, turn in enumerate(turns):
        pictures = f", {turn['pictures']} picture(s) in it" if turn["pictures"] else ""
        printer.say(
            f"--- turn {number + 1} of {environment.max_turns}: the prompt{' goes on' if turn['continues'] else ''}{pictures}"
        )
        printer.say(turn["new"])
        printer.say(f"--- the reply\n{turn['reply']}")
        _show_action(printer, turn)
    if trajectory.error:
        lines = trajectory.error.strip().splitlines()
        places = [line.strip() for line in lines if line.startswith("  File ")]
        print(
            f"error: {lines[-1]}\n  where: {places[-1] if places else 'unknown'}\n  fix: mend that line; an episode that fails so is no training data",
            file=sys.stderr,
        )
    return {"status": trajectory.status.value, "reward": trajectory.reward, "info": trajectory.info, "turns": turns}


def _model_turns(trajectory: Trajectory, tokenizer: Any) -> list[dict[str, Any]]:
    def text_of(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    turns: list[dict[str, Any]] = []
    known: tuple[int, ...] = ()
    for turn in trajectory.turns:
        continues = bool(known) and turn.prompt_ids[: len(known)] == known
        new = text_of(turn.prompt_ids[len(known) :] if continues else turn.prompt_ids)
        known = turn.prompt_ids + turn.token_ids
        entry = _turn(text_of(turn.prompt_ids), text_of(turn.token_ids), turn.action, turn.reward)
        turns.append({**entry, "new": new, "continues": continues, "pictures": len(turn.images)})
    return turns


def _turn(prompt: Any, reply: str, action: Any, reward: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "reply": reply,
        "action": action.text,
        "valid": action.valid,
        "tool_calls": action.tool_calls,
        "reward": float(reward),
    }


def _show_turn(printer: _Printer, number: int, most: int, messages: Sequence[Message]) -> None:
    printer.say(f"--- turn {number + 1} of {most}")
    for message in messages:
        pictures = f" [{len(message.images)} image(s)]" if message.images else ""
        printer.say(f"{message.role}:{pictures} {message.text}")


def _show_action(printer: _Printer, turn: dict[str, Any]) -> None:
    printer.say(f"action: {turn['action']!r}{'' if turn['valid'] else ' (invalid)'}   reward {turn['reward']:g}")
