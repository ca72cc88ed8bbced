"""The one training loop for all systems, with what it needs: optimizer, averaging, checkpoints, processes, tracking."""
