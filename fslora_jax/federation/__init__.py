"""The federation: a client's local steps, the cohort and its layout, the compiled round, the loop over rounds."""
