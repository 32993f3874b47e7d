"""Where environments step: on the event loop, in threads, or in processes."""

from spearrl.envs.pool.pool import Pool, PooledSlot, SlotLost, open_pool

__all__ = ["Pool", "PooledSlot", "SlotLost", "open_pool"]
