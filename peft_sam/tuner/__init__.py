"""PEFT's tuner: a network plus its layers."""
