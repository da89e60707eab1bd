// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title Accepts a round record when more than two thirds of an epoch's stake signed it.
/// @notice Decides quorum and order, nothing about training. An anchored record is final: the next one must name it.
interface ICheckpointAnchor {
    /// @notice What a committee agreed on. `signers` has bit i set for seat i of the epoch's snapshot.
    struct Checkpoint {
        bytes32 task;
        uint64 epoch;
        uint64 round;
        uint64 view_;
        bytes32 recordDigest;
        bytes32 rewardsRoot;
        uint256 signers;
        bytes signature; // 256 bytes, aggregate G2 point in EIP-2537 form
    }

    /// @notice Where a task's chain of records stands.
    struct Line {
        bytes32 head; // the task id before round 1
        uint64 lastRound;
        uint64 lastEpoch; // of the last anchored round
        uint64 epochs; // opened so far: the next to open has this number
        uint64 rounds; // of the task
    }

    /// @param operators in seat order: bit i of a bitmap is operators[i].
    event EpochOpened(
        bytes32 indexed task, uint64 indexed epoch, address snapshot, uint256 totalWeight, address[] operators
    );
    /// @notice Carries the whole call, so that an attestation can be rebuilt from logs alone, whoever called; the record's
    /// digest is kept here and in the head, not in storage.
    event Anchored(
        bytes32 indexed task,
        uint64 indexed round,
        uint64 epoch,
        uint64 view_,
        bytes32 recordDigest,
        bytes32 rewardsRoot,
        bytes32 head,
        uint256 signers,
        bytes signature
    );

    error UnknownTask(bytes32 task);
    error UnknownEpoch(bytes32 task, uint64 epoch);
    error WrongEpoch(uint64 expected, uint64 actual);
    error EpochTooEarly(uint256 earliest);
    /// @notice The committee is older than its lifetime, which ends before its stake can be withdrawn.
    error EpochExpired(uint256 expiredAt);
    error EmptyCommittee();
    error SnapshotFailed();
    error WrongRound(uint64 expected, uint64 actual);
    error TaskFinished(uint64 rounds);
    /// @notice Zero is the vote for no record; a quorum of those anchors nothing.
    error NilRecord();
    error SignerOutOfRange(uint256 members);
    error NoQuorum(uint256 weight, uint256 totalWeight);
    error InfinityAggregate();
    error MalformedSignature();
    /// @notice The pairing did not hold, or the signature is not a point of the prime-order subgroup.
    error BadSignature();
    error BadLifetime();

    /// @notice Freeze the committee of the next epoch from registry and stake, into contract code. Anyone may.
    /// The first epoch of a task may open at once, each later one `epochSeconds` after the one before.
    function openEpoch(bytes32 task, uint64 epoch) external returns (address snapshot);

    /// @notice Anchor the next round. Anyone may submit.
    function anchor(Checkpoint calldata checkpoint) external;

    /// @notice The 32 bytes that a precommit for this checkpoint signs, given the head before it.
    function voteDigest(Checkpoint calldata checkpoint, bytes32 previousHead) external view returns (bytes32);

    function lineOf(bytes32 task) external view returns (Line memory);

    /// @notice Rewards root of a round and the second it was anchored in; zeros when it was not.
    function rewardsOf(bytes32 task, uint64 round) external view returns (bytes32 root, uint48 anchoredAt);

    /// @notice Address whose code holds an epoch's committee, and the second it was opened in.
    function epochOf(bytes32 task, uint64 epoch) external view returns (address snapshot, uint48 openedAt);
}
