"""Training without a network: tasks, local steps, payload codec, fold, scoring.

Law: nothing here opens a socket.  spec, codec, fold and checkpoint need numpy at most, so that the command line
and the simulations start fast; only network, tasks and what imports them load torch.
"""
