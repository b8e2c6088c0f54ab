"""Ranges of activations: observers, where they are put, how data runs through them, which edges share one."""
