"""The rule `isolation.processes` runs this in fresh processes: episodes are played, and what they showed is printed.

The request comes as JSON on standard input; the answer, task ids and episodes, is one line of JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from spearrl.envs.check.checked_environment import BrokenRule, CheckedEnvironment
from spearrl.envs.check.interface import tasks


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    output, sys.stdout = sys.stdout, sys.stderr  # an environment may print
    checked = CheckedEnvironment(**request)
    with suppress(BrokenRule):  # the rule `tasks` has said it already
        tasks(checked)
    splits = dict.fromkeys(task.split for task in checked.played)
    answer = {
        "tasks": [[task.id for task in checked.root.tasks(split)][:1000] for split in splits],
        "ids": [task.id for task in checked.played],
        "traces": [checked.play(checked.spawn(), task) for task in checked.played],
    }
    output.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
