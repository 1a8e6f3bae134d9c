"""Turns rows into tuned adapters, checked against the engine that serves them. Only its own modules import the training stack."""
