"""Does an environment keep its contract? What `spearrl check-env` proves."""

from spearrl.envs.check.check import check_environment, failures

__all__ = ["check_environment", "failures"]
