"""Controls: what the looped core and its exit gate are compared with."""
