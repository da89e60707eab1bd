"""The rules of the network as pure functions and state machines: no I/O, no clock, no randomness."""
