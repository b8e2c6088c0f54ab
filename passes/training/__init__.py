"""Passes for training on rounded numbers: quantizers that train, batch norm that folds, and the way back."""
