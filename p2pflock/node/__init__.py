"""The trio process of a peer: drives protocol/ with the adapters.  The only package that knows them all."""
