"""Adapter files: what is written, what a file must be before anything is read from it, and which base it was made for.

Imports: _peft, sparse, layers.
Imported by: tuner.

* `checkpoint`: the tensors of an adapter; `fingerprint`: what is kept of the base.
"""
