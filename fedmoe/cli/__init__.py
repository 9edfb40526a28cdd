"""The command `fedmoe`: app.py says what can be typed, each other file does one thing of it."""

from fedmoe.cli.app import main

__all__ = ["main"]
