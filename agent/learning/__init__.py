"""The algorithm: networks, losses, one update. No files, no processes, no printing."""
