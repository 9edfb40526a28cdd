"""The Flower ClientApp; the work is done in fedmoe.exchange.flower."""

from fedmoe.exchange.flower import client_app

app = client_app.app  # Flower looks for an assignment
