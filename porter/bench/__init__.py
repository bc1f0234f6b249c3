"""Ports beside Diffusers and the engine's own ports on an accelerator: agreement, speed, memory, at real layer sizes.

Read in this order: `workload` (what is run), `sides` (who runs it), `worker` (a process of one side), `drive` (the
processes of one run, in turn), `record` (what comes out), `judge` (bounds), `report/` (pages and tables).
The Diffusers side imports neither the engine nor a port. It shares with the others what measures: `weights`, `inputs`,
`clock`, `counts`, `kernels`, `compiled`.
"""
