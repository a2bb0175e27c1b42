"""The algorithm: networks, losses, one update. No processes, no printing, and files in `Dreamer.load` alone."""
