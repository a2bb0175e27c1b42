"""Evaluation of an agent and its world model. Nothing here learns."""
