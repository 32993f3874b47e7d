"""Where environments step: on the event loop, in threads, or in processes."""

from spearrl.envs.pool.pool import Place, Pool, SlotLost, open_pool

__all__ = ["Place", "Pool", "SlotLost", "open_pool"]
