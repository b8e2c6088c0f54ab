"""Training on rounded numbers: a model prepared, its schedule, and its conversion to codes."""
