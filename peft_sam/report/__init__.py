"""What was chosen, for people: a table, a picture, the model card.

Imports: selection, config, layers, tuner.
Imported by nobody but the package itself.

* `report`: `selection_report`; `card`: what PEFT's model card says of a sparse adapter.
"""
