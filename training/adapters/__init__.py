"""Low-rank adapters of a run: made by PEFT, read from and written to PEFT's files, merged into what is saved."""
