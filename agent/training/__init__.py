"""The loops: interaction with updates, and updates on a fixed data set."""
