"""What a person sees after a run, and what scripts read: round log, tables, plots, one page."""
