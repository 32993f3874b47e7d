"""A rank of a DeepSpeedLearner that no launcher started: a processes.Child of the trainer."""

from spearrl.learner import serve
from spearrl.processes import connection_to_parent

if __name__ == "__main__":
    connection_to_parent()
    raise SystemExit(serve())
