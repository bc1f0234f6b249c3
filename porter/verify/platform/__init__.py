"""What lets the engine run on a machine without an accelerator, and ports be found without being installed."""
