"""spearrl play: one episode by hand, by the scripted expert or by a model, with everything the model sees.

examples:
  spearrl play webshop env.options.observation=compact
  spearrl play my_agent/config.toml --expert
  spearrl play runs/my-agent --model runs/my-agent --split val eval.temperature=0
  printf '8\\n12\\n' | spearrl play my_pkg.my_env:MyEnvironment --task train-3 --seed 5

By hand you type actions, one a line; an empty line is an empty action, end of input stops.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from spearrl.cli.parsing import add_unsandboxed
from spearrl.cli.target import OVERRIDES_HELP, TARGET_HELP, config_of, model_of
from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.config import RunConfig
    from spearrl.envs import Environment
    from spearrl.rollout import Request
    from spearrl.types import Action, Observation, Task, Turn

STOPPED = "stopped"
Write = Callable[[str], None]  # shows text; says nothing where JSON is printed
LISTED = 12  # admissible actions that are listed


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
    model_help = "a model plays: a run directory (its newest checkpoint), a model directory or a model's name"
    parser.add_argument("--model", metavar="MODEL", help=model_help)
    parser.add_argument(
        "--raw", action="store_true", help="by hand: what you type is the whole reply, not the action in it"
    )
    add_unsandboxed(parser)
    parser.add_argument("--json", action="store_true", help="print the episode as one JSON object instead")


def run(args: argparse.Namespace) -> int:
    from spearrl import envs
    from spearrl.config.foreign import warn_unsandboxed
    from spearrl.errors import ConfigError

    if args.expert and args.model:
        raise ConfigError(
            "--expert and --model are given; one of them can play", where="command line", hint="leave one out"
        )
    overrides = [*args.overrides, *([f"env.style={args.style}"] if args.style else [])]
    config = config_of(args.target, overrides, model=str(model_of(args.model)) if args.model else None)
    warn_unsandboxed(config.env.options, args.unsandboxed)
    name, seed, style = config.env.name, args.seed, config.env.style
    write: Write = (lambda text: None) if args.json else _write
    with _blaming(name):
        environment = envs.instantiate(name, config.env.options, config.env.max_turns)
        task = _task(environment, args.split, args.task)
    write(f"task {task.id} ({task.split}), seed {seed}, style {style}, at most {environment.max_turns} turns\n")
    if args.model:
        episode = _by_model(config, environment, task, seed, write)
    else:
        with _blaming(f"{name}, task {task.id}, seed {seed}"):
            episode = _by_hand(environment, task, style, args, write)
    write(f"{episode['status']}: reward {episode['reward']:g} in {len(episode['turns'])} turns\n")
    if args.json:
        facts = {"environment": name, "task": task.id, "split": task.split, "seed": seed}
        say(json.dumps(facts | episode, default=str))
    return 0


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Raises ContractError, with the line it came from, for whatever an environment raises."""
    from spearrl.errors import ContractError, SpearError

    try:
        yield
    except (SpearError, BrokenPipeError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        hint = "mend that line; reset() and step() answer with what the model can read and do not raise. "
        raise ContractError(
            f"it raised {type(error).__name__}: {error}",
            where=f"{where} ({frame.filename}:{frame.lineno}, in {frame.name})",
            hint=f"{hint}spearrl check-env tries it with many replies",
        ) from error


def _write(text: str) -> None:
    """Print what standard output can show, as it is made."""
    from spearrl.cli.progress import printed

    printed()
    say(text, end="")


def _task(environment: Environment, split: str, task_id: str | None) -> Task:
    """The task of that id, or the first of the split. Raises ConfigError."""
    import difflib

    from spearrl.envs import tasks_of
    from spearrl.errors import ConfigError

    tasks = tasks_of(environment, split, setting="--split")
    task = tasks[0] if task_id is None else next((task for task in tasks if task.id == task_id), None)
    if task is None:
        near = difflib.get_close_matches(task_id or "", [task.id for task in tasks[:5000]], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {len(tasks)}, such as {tasks[0].id}"
        raise ConfigError(f"split {split!r} has no task {(task_id or '')[:80]!r}", where="--task", hint=hint)
    return task


def _by_hand(
    environment: Environment, task: Task, style: str, args: argparse.Namespace, write: Write
) -> dict[str, Any]:
    """The episode of the person or the expert, through the same slot that the trainer uses."""
    from spearrl.envs.pool.slot import Slot
    from spearrl.types import Reply

    slot, most = Slot(environment, style), environment.max_turns
    turns: list[dict[str, Any]] = []
    status = "turn_limit"
    try:
        start = slot.start(task, args.seed)
        messages, observation = start.messages, start.observation
        for tool in start.tools:
            write(f"tool: {json.dumps(tool)}\n")
        for number in range(most):
            write(f"--- turn {number + 1} of {most}\n")
            for message in messages:
                images = f" [{len(message.images)} image(s)]" if message.images else ""
                write(f"{message.role}:{images} {message.text}\n")
            reply = _reply(environment, observation, args, write)
            if reply is None:
                status = STOPPED
                break
            played = slot.act(Reply(reply, (), "stop"), number + 1 == most)
            outcome, prompt = played.outcome, [[message.role, message.text] for message in messages]
            pictures = sum(len(message.images) for message in messages)
            turns.append({**_turn(prompt, reply, played.action, outcome.reward), "pictures": pictures})
            write(_action_line(turns[-1]))
            messages, observation = played.messages, outcome.observation
            if outcome.terminated or outcome.truncated:
                ended = "success" if outcome.info.get("success") else "failure"
                status = ended if outcome.terminated else "turn_limit"
                write(f"end: {observation.text}\ninfo: {json.dumps(dict(outcome.info), default=str)}\n")
                break
    finally:
        slot.close()
    return {"status": status, "reward": sum(turn["reward"] for turn in turns), "turns": turns}


def _reply(environment: Environment, observation: Observation, args: argparse.Namespace, write: Write) -> str | None:
    """What the player says; None at the end of input."""
    from spearrl.errors import ConfigError

    if args.expert:
        action = environment.expert()
        if action is None:
            message = f"{type(environment).__name__} has no scripted expert here"
            raise ConfigError(message, where="--expert", hint="play by hand, or with --model")
        return environment.format(action)
    if actions := observation.admissible:
        more = f" | … {len(actions) - LISTED} more" if len(actions) > LISTED else ""
        write(f"(possible: {' | '.join(actions[:LISTED])}{more})\n")
    if sys.stdin.isatty():
        say("> ", end="", file=sys.stderr)
    line = sys.stdin.readline()
    if not line:
        return None
    text = line.rstrip("\n")
    return text if args.raw else environment.format(text)


def _by_model(config: RunConfig, environment: Environment, task: Task, seed: int, write: Write) -> dict[str, Any]:
    """The episode of a model through the trainer's own collector, shown as it is played, control tokens too."""
    from spearrl.cli.progress import Progress, watched
    from spearrl.launch.assembly import players_of
    from spearrl.launch.factories import make_collector, make_pool
    from spearrl.launch.processors import with_sampling_dtype
    from spearrl.models import prepare_torch
    from spearrl.models.plain_text import decoded
    from spearrl.start.origin import with_pinned_model

    with ExitStack() as stack:
        stack.enter_context(watched("loading the model"))
        config = with_sampling_dtype(with_pinned_model(config, environment), Progress().report)
        config = config.with_settings({"rollout.workers": 0, "rollout.slots": 1})
        players = players_of(config, environment, prepare_torch(config), stack)
        engine, encoder = cast(Any, players.engine), cast(Any, players.evaluator).encoder
        tokenizer = encoder.tokenizer
        # The collector derives a seed of its own; here the episode is the one that --seed names, as by hand.
        pool = make_pool(config, environment, episode_seed=seed)
        stack.callback(pool.close)
        collector = make_collector(config, engine, encoder, pool, sampling=(config.eval.temperature, config.eval.top_p))
        screen = _Screen(partial(decoded, tokenizer), write, environment.max_turns)
        collector.on_turn = screen.turn
        if hasattr(engine, "on_token"):  # the embedded engine; from another one replies come whole
            engine.on_token = screen.token
        (group,) = collector.collect([task], 1, run_seed=seed, step=0, first_group_id=0, purpose="play")
    trajectory = group.trajectories[0]
    turns = []
    for turn in trajectory.turns:
        prompt, reply = decoded(tokenizer, turn.prompt_ids), decoded(tokenizer, turn.token_ids)
        turns.append({**_turn(prompt, reply, turn.action, turn.reward), "pictures": len(turn.images)})
    if turns and turns[-1]["reward"] != screen.reward:  # what a cut episode pays
        write(f"cut short: the last turn's reward is {turns[-1]['reward']:g}\n")
    if trajectory.error:
        lines = trajectory.error.strip().split("\n")
        frames = [line.strip() for line in lines if line.startswith("  File ")]
        fix = "mend that line; an episode that fails so is no training data"
        where = frames[-1] if frames else "unknown"
        say(f"error: {lines[-1]}\n  where: {where}\n  fix: {fix}", file=sys.stderr)
    return {"status": trajectory.status.value, "reward": trajectory.reward, "info": trajectory.info, "turns": turns}


class _Screen:
    """Shows an episode of a model while it is played: each prompt, the tokens of the reply, the action."""

    def __init__(self, text_of: Callable[[Sequence[int]], str], write: Write, most: int):
        self._text_of, self._write, self._most = text_of, write, most
        self._turn, self._written = -1, 0
        self._reply: list[int] = []
        self._before: tuple[int, ...] = ()  # ids of the turn before
        self.reward = 0.0

    def token(self, request: Request, token: int) -> None:
        """A token was drawn."""
        if not self._reply:
            self._begin(request.id[-1], request.token_ids, len(request.images))
        self._reply.append(token)
        text = self._text_of(self._reply)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of the character comes with the next token
            self._write(text[self._written :])
            self._written = len(text)

    def turn(self, turn: Turn) -> None:
        """A turn ended."""
        if not self._reply:
            self._begin(self._turn + 1, turn.prompt_ids, len(turn.images))
        self._write(self._text_of(turn.token_ids)[self._written :] + "\n")
        self._write(_action_line(_turn("", "", turn.action, turn.reward)))
        self._before, self._reply, self._written, self.reward = turn.prompt_ids + turn.token_ids, [], 0, turn.reward

    def _begin(self, number: int, prompt: tuple[int, ...], pictures: int) -> None:
        if number <= self._turn:
            self._write("played again from the start\n")
            self._before = ()
        self._turn = number
        known = len(self._before) if self._before and prompt[: len(self._before)] == self._before else 0
        continues, images = " goes on" if known else "", f", {pictures} picture(s) in it" if pictures else ""
        self._write(f"--- turn {number + 1} of {self._most}: the prompt{continues}{images}\n")
        self._write(f"{self._text_of(prompt[known:])}\n--- the reply\n")


def _turn(prompt: Any, reply: str, action: Action, reward: float) -> dict[str, Any]:
    played = {"action": action.text, "valid": action.valid, "tool_calls": action.tool_calls}
    return {"prompt": prompt, "reply": reply, **played, "reward": float(reward)}


def _action_line(turn: dict[str, Any]) -> str:
    return f"action: {turn['action']!r}{'' if turn['valid'] else ' (invalid)'}   reward {turn['reward']:g}\n"
