"""What was chosen."""
