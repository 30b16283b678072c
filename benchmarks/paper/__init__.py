"""The paper's experiments, with any base model: `python -m benchmarks.paper run`, `table`, `plots`."""
