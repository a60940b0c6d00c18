"""Training: what a run is (`recipes`), what it trains (`setup`), how (`loop`), and its files (`checkpoints`)."""
