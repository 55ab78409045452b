"""Agents of reinforcement learning, on RLlib."""
