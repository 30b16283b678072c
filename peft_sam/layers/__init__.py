"""A module plus its deltas."""
