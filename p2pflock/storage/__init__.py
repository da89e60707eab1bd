"""What a peer keeps on disk: blocks, votes, state and keys; and Kubo, where somebody runs one."""
