"""Parity with golden outputs of the released implementation, one module per kind of model."""
