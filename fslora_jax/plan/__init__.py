"""What a round would take on devices that are not here: compiled ahead of time, from abstract arrays alone."""
