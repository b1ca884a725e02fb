"""Studies: a grid of runs over any settings, resumable, and the tables that they give."""
