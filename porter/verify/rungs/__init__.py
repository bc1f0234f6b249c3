"""The verification ladder, one rung per module. Each rung is a function that returns a frozen `RungResult`."""
