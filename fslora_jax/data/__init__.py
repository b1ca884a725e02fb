"""Labelled texts: reading, tokenising, dividing among clients, packing into batches."""
