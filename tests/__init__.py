"""Tests, in the rooms of what they test. First of all: no hub, and a log without what is not ours to mend."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what they say when imported: kernels for GPUs that this machine cannot load, and each other's deprecations
for noisy in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
