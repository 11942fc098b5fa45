"""How good scores are and how fast: what `meiqa eval`, `calibrate` and `bench` compute."""
