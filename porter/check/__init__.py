"""The last phase: what is true of every emitted file, whatever it was made from."""
