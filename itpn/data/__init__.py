"""From files on disk to batches of uint8 tensors, the same for any number of workers, ranks or restarts."""
