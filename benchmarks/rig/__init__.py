"""The rig: methods of fine-tuning, their training, and many runs of it, for `benchmarks.paper`."""
