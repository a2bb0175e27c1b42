"""Where numbers go: TensorBoard, CSV, JSON lines, terminal, video files."""
