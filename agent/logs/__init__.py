"""The log of a run: TensorBoard, CSV, JSON lines, terminal, video files."""
