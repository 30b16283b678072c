"""Tests, in the rooms of what they test. Before anything is imported: a log without what is not ours to mend."""

import logging

# what they say when imported: kernels for GPUs that this machine cannot load, and each other's deprecations
for noisy in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
