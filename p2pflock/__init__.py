"""p2pflock: train models in a peer-to-peer swarm, with provenance anyone can check."""

__version__ = "0.1.0"
