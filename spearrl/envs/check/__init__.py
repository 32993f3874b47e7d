"""Does an environment keep its contract? What `spearrl check-env` proves."""

from spearrl.envs.check.check import Finding, check_environment, failures

__all__ = ["Finding", "check_environment", "failures"]
