"""The exchange over Flower: server and clients as processes of their own, or in its simulation.

What runs in the process that Flower starts for every message (`client_app`, `forward`, `post`,
`records`, `terms`) imports no torch: the work is done by a process that stays, the `worker`.
"""
