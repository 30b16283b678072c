"""The choosing wing: from batches and losses to a `Selection`. Works on any `nn.Module`, without PEFT.

Imports: scores, selection.
Imported by: selecting.

* `gradients`: `accumulate`, one pass over the data; `sums`: what it adds up; `linear_calls`: the gradients of weights
  that cannot have one of their own; `curvature`: the Hessian's diagonal.
* `choose`: from statistics to a selection; `threshold`: the k largest scores; `groups`: within bounded memory;
  `share`: what of the gradient the selected entries have.
* `dense`: short dense training, which is undone; `movement`: how far it moved each entry.
* `before`: everything that a pass changes on its way, put back.
* `processes`, `shards`: several processes, and parameters that they have in parts.
"""
