"""The control plane over py-libp2p: gossip, requests, connections.  The only imports of libp2p are here.

Law: everything a foreign peer can reach goes through `hardening`; what leaves this package are the Host port
of p2pflock.ports and our own errors, never a libp2p object.  Importing this package imports no libp2p.
"""
