"""Replay buffer, image files, checkpoint files, data sets. No networks."""
