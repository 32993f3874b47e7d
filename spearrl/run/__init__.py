"""What a run leaves on disk and says of itself: its directory, checkpoints, metrics and health."""

from spearrl.run.directory import Run, write_trajectories

__all__ = ["Run", "write_trajectories"]
