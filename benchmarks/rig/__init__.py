"""The rig: what `benchmarks.paper` and `benchmarks.recipe` share.

* `tasks`, `language`, `batches`: rows of token numbers to learn from, to choose settings on and to measure on
* `models`: a pretrained model with a task's head
* `method`, `adapters`, `diffpruning`, `methods`: what a way to fine-tune is; the ways; the table of them
* `loop`, `run`, `clock`: training; one run and its line; its seconds and memory
* `runs`: the grid, the seeds, the processes
* `lines`, `compare`: what lines of results say; methods beside one another, seed by seed
"""
