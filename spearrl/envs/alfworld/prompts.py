"""Prompts around the engine's text: the rules at the start of a chat, and SPEAR's windowed prompt (arXiv 2509.22601, ALFWorld)."""

from __future__ import annotations

from collections.abc import Sequence

ROLE = "You are an expert agent operating in the ALFRED Embodied Environment."
RULES = """You are in a household and do the task by typing one command a turn:
go to (receptacle), open (receptacle), close (receptacle), take (object) from (receptacle), {put},
clean (object) with (receptacle), heat (object) with (receptacle), cool (object) with (receptacle), use (object),
slice (object) with (object), examine (something), look, inventory.
Things go by name and number, as in: {example}."""
TAGGED = "Think inside <think> </think> tags, then give one action inside <action> </action> tags."
PLAIN = "Answer with the action alone."

PAST = "So far you have taken {count} step(s). The last {shown} observation(s) with the action taken at each:\n{history}"
NOW = "You are now at step {step} and your current observation is: {text}"
FIRST = "Your current observation is: {text}"
CHOICES = "The actions admissible now are: [{actions}]."
REASON = "It is your turn. Reason step by step inside <think> </think> tags first, then give one admissible action inside <action> </action> tags."


def rules(*, tagged: bool, old: bool) -> str:
    """What a chat opens with."""
    put, example = ("put (object) in/on (receptacle)", "put mug 1 in/on desk 2") if old else ("move (object) to (receptacle)", "move mug 1 to desk 2")
    return f"{RULES.format(put=put, example=example)}\n{TAGGED if tagged else PLAIN}"


def windowed(task: str, text: str, actions: Sequence[str], past: Sequence[tuple[str, str]], count: int, *, tagged: bool) -> str:
    """One turn's whole prompt: task, the last steps in `past` (of `count` taken), observation, actions but `help`.

    The first observation holds the task itself.
    """
    shown = "\n ".join(f"'{action}'" for action in actions if action != "help")
    end = [CHOICES.format(actions=shown), "", REASON if tagged else PLAIN]
    if not count:
        return "\n".join([ROLE, FIRST.format(text=text), *end])
    numbered = enumerate(past, count - len(past) + 1)
    history = "\n".join(f"[Observation {number}: '{seen}', Action {number}: '{done}']" for number, (seen, done) in numbered)
    middle = [PAST.format(count=count, shown=len(past), history=history)] if past else []
    return "\n".join([f"{ROLE} Your task is to: {task}", *middle, NOW.format(step=count + 1, text=text), *end])
