"""Adapter files: what is written, what a file must be before anything is read from it, and which base it was made for.

Imports: _peft, config, sparse, layers.
Imported by: tuner.

* `checkpoint`: the tensors of an adapter; `embeddings`: those of the base that belong to it, where they were resized;
  `fingerprint`: what is kept of the base.
"""
