"""Personalised mixture-of-experts models across clients who keep their data."""

__version__ = "0.1.0"
