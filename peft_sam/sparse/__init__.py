"""The sparse change of one parameter: its support, its code, its values and its products."""
