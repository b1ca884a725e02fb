"""Side-by-side measurement of one federated round: this engine, its variants, and what users would run instead."""
