"""hivemind behind the Swarm port: DHT records, payload exchange, dense average.

The only package that imports hivemind, and only inside its child process (process.py): hivemind and py-libp2p
cannot live in one interpreter.  The node imports client.py.
"""
