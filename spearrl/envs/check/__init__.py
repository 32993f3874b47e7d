"""Does an environment keep its contract? What `spearrl check-env` proves."""

from spearrl.envs.check.check import RuleFinding, check_environment, failures

__all__ = ["RuleFinding", "check_environment", "failures"]
