"""The chain port over web3: contracts, transactions, events, and the embedded development chain.

`EvmChain` is the port; `deploy` and `fund` set a network up; `Anvil` runs the development chain.
"""
