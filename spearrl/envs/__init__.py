"""Environments: the interface, and the built-in ones by name."""

from spearrl.envs.base import Environment, load, make, option_errors

__all__ = ["Environment", "load", "make", "option_errors"]
