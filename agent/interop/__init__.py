"""Interfaces to stable-baselines3, Gymnasium and torch.export."""
