"""Batches whose loss or gradient was not finite, kept in a run directory: bad_batch/step-000120.safetensors and .json.

`spearrl replay` makes their optimiser step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spearrl.batching import Batch, Rows
from spearrl.errors import RefusedError
from spearrl.learner.loss_inputs import Share
from spearrl.losses import Objective
from spearrl.run.checkpoint import load_state, save_state

FOLDER, FORMAT = "bad_batch", 1
KEPT = 4  # newest batches that stay
FIELDS = ("seed", "denominators", "rows", "current")  # of a Share, beside its batch and its objectives


def keep(run: Path, step: int, shares: Sequence[Share]) -> Path:
    """Write the batch of an optimiser step that was left out; returns its file.

    Raises:
        OSError, SafetensorError: the disk is full.
    """
    folder = run / FOLDER
    stored = [
        {
            "batch": {"rows": share.batch.rows.state_dict(), "tensors": share.batch.tensors()},
            "objectives": [[asdict(objective), factor] for objective, factor in share.objectives],
            **{name: getattr(share, name) for name in FIELDS},
        }
        for share in shares
    ]
    save_state(folder, f"step-{step:06d}", {"format": FORMAT, "step": step, "shares": stored})
    for old in sorted(folder.glob("step-*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    return folder / f"step-{step:06d}.safetensors"


def load(file: Path) -> tuple[int, list[Share]]:
    """(training step, shares) that `keep` wrote. Raises RefusedError for a file that it did not write."""
    try:
        state = load_state(file.parent, file.name.removesuffix(".json").removesuffix(".safetensors"))
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}; expected {FORMAT}")
        return int(state["step"]), [_share(fields) for fields in state["shares"]]
    except Exception as error:  # whatever a file that something else wrote makes of it
        text = f"no batch that a run kept ({type(error).__name__}: {error})"
        raise RefusedError(text, where=str(file), hint=f"give a file of a run's {FOLDER}/") from error


def _share(fields: dict) -> Share:  # type: ignore[type-arg]
    batch = Batch(Rows.from_state(fields["batch"]["rows"]), **fields["batch"]["tensors"])
    objectives = [(Objective.from_dict(objective), factor) for objective, factor in fields["objectives"]]
    return Share(batch, objectives, **{name: fields[name] for name in FIELDS})
