"""Rows and files: replay, images on disk, checkpoints, data sets. No networks."""
