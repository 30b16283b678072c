"""Scripts that tests run in processes of their own; `launch` starts them."""
