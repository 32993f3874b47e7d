"""The Fetch toy in processes of its own, so that what hits an environment leaves who plays with it alive."""

from __future__ import annotations

from tests.support import toy_envs


class Fetch(toy_envs.Fetch):
    execution = "process"
