"""The stairs between the two wings: `select_parameters`.

Imports: scores, selection, recorded, config, choosing, layers, tuner.
Imported by nobody but the package itself.

* `select`: `select_parameters`; `adapter`: which one is meant; `batches`: where the batches and their losses come from;
  `counts`: what a batch counts; `once`, `order`: reading a loader without repeats, and leaving its order as it is;
  `passes`: the passes that one selection needs, within a memory budget; `twin`: a sharded copy for the time of a pass;
  `taken`: what was prepared before and would not train what is selected; `rates`: a word on learning rates;
  `exclude`: entries of other adapters.
"""
