"""From gradients to a selection."""
