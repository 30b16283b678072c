"""The sparse change of one parameter: its support, its code, its values, and its products with activations.

Imports nothing of the package.
Imported by: selection, layers, files, tuner, export.

* `support`: what a support is; `coding`: a support in few bytes, as adapter files hold it.
* `delta`: `SparseDelta`, a support and its values, pending until it has one.
* `scaled`: a delta times a number; `at_hand`: parameters that stay in memory where their layer is offloaded.
* `ops`: the products with W + Δ and their gradients, by the ways of `products`, chosen once per support in `plan` by
  the `costs` of the device; `scratch`: the buffers that layers share.
"""
