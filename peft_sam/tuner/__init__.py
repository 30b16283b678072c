"""PEFT's tuner for sparse adapters: a network plus its layers.

Imports: _peft, scores, selection, recorded, config, sparse, layers, files.
Imported by: selecting, report, export.

* `model`: `SamModel`, PEFT's BaseTuner; `injection`: putting an adapter in, and out again if that fails; `adapting`:
  giving one module its deltas.
* `targets`: which modules a config means; `embeddings`: tied ones, and those trained by rows.
* `candidates`: what an adapter can change, and giving it its support.
* `ties`: parameters that several modules own, and modules in several places.
* `arithmetic`: adapters out of adapters; `hotswap`: one in the place of another; `merged`: merged for a while.
* `moved`: buffers of the base that training moves; `optimizer`: learning rates of the values.
* `states`: what `load_state_dict` does with what comes in; `filling`: what PEFT's loading does.
"""
