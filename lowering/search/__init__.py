"""Mixed precision by search: what each layer's rounding costs, and the choice that a budget allows."""
