"""Which recipe beats LoRA, and where: `python -m benchmarks.recipe run`, `report`, `plots`."""
