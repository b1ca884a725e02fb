"""A run or a study as one page: words, numbers, figures, settings, commands."""
