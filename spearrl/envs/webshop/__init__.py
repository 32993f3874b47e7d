"""WebShop, natively: the original's pages, search and reward without its web server and Java."""

from spearrl.envs.webshop.env import WebShop

__all__ = ["WebShop"]
