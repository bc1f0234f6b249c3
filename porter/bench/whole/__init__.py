"""Whole requests end to end at real size: encode, denoise, decode, by Diffusers' pipeline and by the engine's runner.

Read in this order: `request` (what is asked), `skeleton` (the checkpoint, without weights), `components` (models with random
weights), `marks` and `phases` (where a request's time goes), `served` (one request), `side_diffusers` and `side_engine` (who
serves it), `drive` (the processes of one run), `agreement` and `judge` (what they gave), `../report` (pages and tables).
"""
