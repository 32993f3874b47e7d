"""Prompts around the pages: the rules at the start of a chat, and SPEAR's windowed prompt (arXiv 2509.22601, WebShop)."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 13_000  # characters; a longer windowed prompt drops its history, as verl-agent does

RULES = """You shop in an online store for the item described in the instruction.
Each turn you see a page and answer with one action:
search[words] looks for products, from any page;
click[name] presses a button, opens a product or picks an option named on the page.
Open a product that fits, pick the options asked for, then click[Buy Now]."""

TAGGED = "Think inside <think> </think> tags, then give one action inside <action> </action> tags."
PLAIN = "Answer with the action alone."

ROLE = "You are an expert autonomous agent shopping in the WebShop e-commerce environment."
TASK = "The task: {task}."
PAST = "So far you have taken {count} step(s). The last {shown} observation(s) with the action taken at each:\n{history}"
THEN = "This is step {step}; the page now shows: {page}."
NOW = "The page now shows: {page}."
CHOICES = "Actions admissible now:\n[\n{actions}\n]."
DECIDE = "Choose the admissible action that best advances the shopping goal."
REASON = "Reason step by step about the page first, inside <think> </think> tags. Then give the chosen action inside <action> </action> tags."


def rules(tagged: bool) -> str:
    """What a chat opens with."""
    return f"{RULES}\n{TAGGED if tagged else PLAIN}"


def windowed(task: str, page: str, actions: Sequence[str], past: Sequence[tuple[str, str]], count: int, *, tagged: bool) -> str:
    """One turn's whole prompt: task, the last steps in `past` (of `count` taken), page, actions. Without history where that gets too long."""
    end = [CHOICES.format(actions="\n".join(f"'{action}'," for action in actions)), DECIDE, REASON if tagged else PLAIN]
    short = "\n".join([ROLE, TASK.format(task=task), NOW.format(page=page), *end])
    if not past:
        return short
    numbered = enumerate(past, count - len(past) + 1)
    history = "\n".join(f"[Observation {number}: '{seen}', Action {number}: '{done}']" for number, (seen, done) in numbered)
    middle = [PAST.format(count=count, shown=len(past), history=history), THEN.format(step=count + 1, page=page)]
    full = "\n".join([ROLE, TASK.format(task=task), *middle, *end])
    return full if len(full) <= LONGEST else short


def compact_window(task: str, page: str, past: Sequence[tuple[str, str]]) -> str:
    """The windowed prompt of the compact rendering: task, last steps, page."""
    return "\n".join([task, *(f"{seen}\n> {done}" for seen, done in past), page])
