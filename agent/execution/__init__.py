"""How an update runs, and never what it computes: eager, CUDA graphs, torch.compile, data parallel."""
