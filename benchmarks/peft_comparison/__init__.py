"""SAM adapters in the method comparison of PEFT's repository."""
