"""The Flower ServerApp; the work is done in fedmoe.exchange.flower."""

from fedmoe.exchange.flower import server_app

app = server_app.app  # Flower looks for an assignment
