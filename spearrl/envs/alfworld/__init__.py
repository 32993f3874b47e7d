"""ALFWorld's text games, natively: the original's text, commands and success without TextWorld and its planner."""

from spearrl.envs.alfworld.env import ALFWorld

__all__ = ["ALFWorld"]
