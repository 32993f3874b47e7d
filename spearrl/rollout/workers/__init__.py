"""Rollout workers: engines and environments in processes of their own, driven by messages."""
