"""The Flower ServerApp of a checkout: `flwr run .` finds it here; the work is fedmoe's."""
