// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";

import {ICheckpointAnchor} from "./interfaces/ICheckpointAnchor.sol";
import {IRewards} from "./interfaces/IRewards.sol";
import {ITasks} from "./interfaces/ITasks.sol";

/// @notice See IRewards, which states the law of this contract.
contract Rewards is IRewards, ReentrancyGuardTransient {
    ITasks public immutable TASKS;
    ICheckpointAnchor public immutable ANCHOR;
    /// @notice Seconds between the anchor of a root and the first claim against it.
    uint256 public immutable CHALLENGE_SECONDS;

    mapping(bytes32 task => mapping(address account => uint256)) public override claimedOf;

    constructor(ITasks tasks, ICheckpointAnchor anchor, uint256 challengeSeconds) {
        TASKS = tasks;
        ANCHOR = anchor;
        CHALLENGE_SECONDS = challengeSeconds;
    }

    function claim(bytes32 task, uint64 round, address account, uint256 cumulative, bytes32[] calldata proof)
        external
        override
        nonReentrant
        returns (uint256 amount)
    {
        (bytes32 root, uint48 anchoredAt) = ANCHOR.rewardsOf(task, round);
        if (anchoredAt == 0) revert NotAnchored(task, round);
        if (block.timestamp < anchoredAt + CHALLENGE_SECONDS) {
            revert ChallengeWindowOpen(anchoredAt + CHALLENGE_SECONDS);
        }
        // Hashed twice, so that no inner node of the tree can be passed off as a leaf.
        bytes32 leaf = keccak256(bytes.concat(keccak256(abi.encode(task, account, cumulative))));
        if (!MerkleProof.verifyCalldata(proof, root, leaf)) revert BadMerkleProof();

        uint256 claimed = claimedOf[task][account];
        if (cumulative <= claimed) revert NothingDue(claimed, cumulative);
        amount = cumulative - claimed;
        claimedOf[task][account] = cumulative;
        emit Claimed(task, account, round, amount, cumulative);
        TASKS.pay(task, round, account, amount);
    }
}
