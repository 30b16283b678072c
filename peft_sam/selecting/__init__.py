"""`select_parameters`: the stairs between choosing and adapting."""
