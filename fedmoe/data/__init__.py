"""Where examples come from, and how they are shared out over clients."""
