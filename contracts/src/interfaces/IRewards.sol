// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title Pays what an anchored Merkle root says an account has earned so far. Pull only.
interface IRewards {
    event Claimed(
        bytes32 indexed task, address indexed account, uint64 round, uint256 amount, uint256 cumulative
    );

    error NotAnchored(bytes32 task, uint64 round);
    error ChallengeWindowOpen(uint256 matureAt);
    error BadMerkleProof();
    error NothingDue(uint256 claimed, uint256 cumulative);

    /// @notice Pay `account` the part of `cumulative` that it has not had yet. Anyone may call; only it is paid.
    /// @param round whose rewards root to prove against; anchored at least a challenge window ago. Its share of the
    /// escrow bounds the sum of all claims, so late claimants use the newest root that has matured.
    /// @param cumulative all that `account` earned in `task` up to `round`, in wei.
    /// @param proof OpenZeppelin Merkle proof of keccak256(keccak256(abi.encode(task, account, cumulative))).
    function claim(bytes32 task, uint64 round, address account, uint256 cumulative, bytes32[] calldata proof)
        external
        returns (uint256 amount);

    /// @notice All that `account` has been paid for `task`.
    function claimedOf(bytes32 task, address account) external view returns (uint256);
}
