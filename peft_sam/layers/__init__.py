"""The adapting wing: a module plus its deltas. A new kind of layer is one class here and one row of `make.LAYERS`.

Imports: _peft, sparse.
Imported by: files, tuner, selecting, report, export.

* `facade`: what a layer shows of its module; `holder`: the deltas that it holds; `base`: `SamLayer`, which
  runs with them, right for any module; `linear`, `embedding`: faster ones; `few_tokens`: a linear one's shortest way;
  `low_rank`: pairs beside the deltas of linear ones; `make`: which of them adapts a module.
* `deltas`: an adapter's deltas in one layer; `owned`: which parameters are a module's; `found`: the layers of a model.
* `substitute`: calling a module with other tensors in place of its parameters; `replicas`: beside sharded parameters;
  `mixed`: an adapter for each sample.
* `merging`: writing deltas into the base, and putting the original bits back; `quantised`: the same where the base is
  quantised.
"""
