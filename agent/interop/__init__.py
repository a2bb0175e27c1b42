"""Other people's interfaces: stable-baselines3, Gymnasium, torch.export."""
