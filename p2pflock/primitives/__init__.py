"""Encodings, hashes, signatures and seeded choice: pure functions over bytes and integers.

Law: nothing in here does I/O, reads a clock or draws randomness, and nothing imports a higher layer.
Input from peers that breaks a rule raises errors.InvalidMessageError; predicates return False.
"""
