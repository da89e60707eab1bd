// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {PairingGas} from "./PairingGas.sol";
import {ICheckpointAnchor} from "./interfaces/ICheckpointAnchor.sol";
import {IPeerRegistry} from "./interfaces/IPeerRegistry.sol";
import {IStaking} from "./interfaces/IStaking.sol";
import {ITasks} from "./interfaces/ITasks.sol";
import {BLS12381} from "./libraries/BLS12381.sol";
import {CommitteeCode} from "./libraries/CommitteeCode.sol";

/// @notice See ICheckpointAnchor, which states the law of this contract.
contract CheckpointAnchor is ICheckpointAnchor, PairingGas {
    bytes32 private constant VOTE_TYPEHASH = keccak256(
        "Vote(uint256 chainId,address anchor,bytes32 task,uint64 epoch,uint64 round,uint64 view,uint8 step,bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
    );
    bytes32 private constant HEAD_TYPEHASH = keccak256(
        "Head(bytes32 task,uint64 round,bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
    );
    uint256 private constant PRECOMMIT = 1;

    struct Epoch {
        address snapshot;
        uint48 openedAt;
    }

    struct Round {
        bytes32 rewardsRoot;
        uint48 anchoredAt;
    }

    IPeerRegistry public immutable REGISTRY;
    IStaking public immutable STAKING;
    ITasks public immutable TASKS;
    /// @notice Seconds between two epochs of a task.
    uint256 public immutable EPOCH_SECONDS;
    /// @notice Seconds for which a committee may anchor. Choose it below the staking cooldown less the challenge
    /// window: then whoever could still sign for an epoch has stake to lose.
    uint256 public immutable LIFETIME_SECONDS;

    mapping(bytes32 task => Line) private _lines;
    mapping(bytes32 task => mapping(uint64 epoch => Epoch)) private _epochs;
    mapping(bytes32 task => mapping(uint64 round => Round)) private _rounds;

    constructor(
        IPeerRegistry registry,
        IStaking staking,
        ITasks tasks,
        uint256 epochSeconds,
        uint256 lifetimeSeconds,
        address owner
    ) PairingGas(owner) {
        if (lifetimeSeconds < epochSeconds) revert BadLifetime();
        REGISTRY = registry;
        STAKING = staking;
        TASKS = tasks;
        EPOCH_SECONDS = epochSeconds;
        LIFETIME_SECONDS = lifetimeSeconds;
    }

    function openEpoch(bytes32 task, uint64 epoch) external override returns (address snapshot) {
        Line storage line = _lines[task];
        if (epoch != line.epochs) revert WrongEpoch(line.epochs, epoch);
        if (epoch == 0) {
            line.rounds = TASKS.roundsOf(task);
            if (line.rounds == 0) revert UnknownTask(task);
            line.head = task;
        } else {
            uint256 earliest = _epochs[task][epoch - 1].openedAt + EPOCH_SECONDS;
            if (block.timestamp < earliest) revert EpochTooEarly(earliest);
        }
        line.epochs = epoch + 1;

        (address[] memory operators, uint128[] memory weights) = STAKING.seats();
        if (operators.length == 0) revert EmptyCommittee();
        uint256 totalWeight;
        (snapshot, totalWeight) = CommitteeCode.store(REGISTRY.packedKeys(operators), weights);
        if (snapshot == address(0)) revert SnapshotFailed();
        _epochs[task][epoch] = Epoch(snapshot, uint48(block.timestamp));
        emit EpochOpened(task, epoch, snapshot, totalWeight, operators);
    }

    function anchor(Checkpoint calldata c) external override {
        Line memory line = _lines[c.task];
        if (c.round != line.lastRound + 1) revert WrongRound(line.lastRound + 1, c.round);
        if (c.epoch >= line.epochs) revert UnknownEpoch(c.task, c.epoch);
        if (c.round > line.rounds) revert TaskFinished(line.rounds);
        if (c.epoch < line.lastEpoch) revert WrongEpoch(line.lastEpoch, c.epoch);
        if (c.recordDigest == 0) revert NilRecord();
        if (c.signature.length != BLS12381.G2_BYTES) revert MalformedSignature();
        _checkQuorum(c, line.head);

        bytes32 head =
            keccak256(abi.encode(HEAD_TYPEHASH, c.task, c.round, c.recordDigest, c.rewardsRoot, line.head));
        line.head = head;
        line.lastRound = c.round;
        line.lastEpoch = c.epoch;
        _lines[c.task] = line;
        _rounds[c.task][c.round] = Round(c.rewardsRoot, uint48(block.timestamp));
        emit Anchored(
            c.task, c.round, c.epoch, c.view_, c.recordDigest, c.rewardsRoot, head, c.signers, c.signature
        );
    }

    function voteDigest(Checkpoint calldata c, bytes32 previousHead) public view override returns (bytes32) {
        return keccak256(
            abi.encode(
                VOTE_TYPEHASH,
                block.chainid,
                address(this),
                c.task,
                c.epoch,
                c.round,
                c.view_,
                PRECOMMIT,
                c.recordDigest,
                c.rewardsRoot,
                previousHead
            )
        );
    }

    function lineOf(bytes32 task) external view override returns (Line memory) {
        return _lines[task];
    }

    function rewardsOf(bytes32 task, uint64 round) external view override returns (bytes32, uint48) {
        Round storage r = _rounds[task][round];
        return (r.rewardsRoot, r.anchoredAt);
    }

    function epochOf(bytes32 task, uint64 epoch) external view override returns (address, uint48) {
        Epoch storage e = _epochs[task][epoch];
        return (e.snapshot, e.openedAt);
    }

    function _checkQuorum(Checkpoint calldata c, bytes32 previousHead) private view {
        Epoch memory e = _epochs[c.task][c.epoch];
        if (block.timestamp > e.openedAt + LIFETIME_SECONDS) {
            revert EpochExpired(e.openedAt + LIFETIME_SECONDS);
        }
        uint256 members = CommitteeCode.count(e.snapshot);
        if (c.signers >> members != 0) revert SignerOutOfRange(members);
        (uint256[4] memory key, uint256 weight, uint256 totalWeight) =
            CommitteeCode.aggregate(e.snapshot, members, c.signers);
        if (3 * weight <= 2 * totalWeight) revert NoQuorum(weight, totalWeight);
        // Keys that cancel out: then the signature at infinity would hold for any message.
        if (BLS12381.isInfinity(key)) revert InfinityAggregate();
        if (!BLS12381.verify(
                key, voteDigest(c, previousHead), BLS12381.SIGNATURE_DST, c.signature, pairingGas
            )) {
            revert BadSignature();
        }
    }
}
