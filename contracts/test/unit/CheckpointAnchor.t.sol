// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {console} from "forge-std/Test.sol";

import {CheckpointAnchor} from "../../src/CheckpointAnchor.sol";
import {ICheckpointAnchor} from "../../src/interfaces/ICheckpointAnchor.sol";
import {BlsSigner} from "../BlsSigner.sol";
import {Swarm} from "../Swarm.sol";

contract CheckpointAnchorTest is Swarm {
    bytes32 private constant HEAD_TYPEHASH = keccak256(
        "Head(bytes32 task,uint64 round,bytes32 recordDigest,bytes32 rewardsRoot,bytes32 previousHead)"
    );

    function _expectRefused(ICheckpointAnchor.Checkpoint memory c, bytes memory why) internal {
        bytes32 head = anchor.lineOf(TASK).head;
        vm.expectRevert(why);
        anchor.anchor(c);
        assertEq(anchor.lineOf(TASK).head, head);
    }

    function test_anchorsAndChains() public {
        _start(4);
        bytes32 head = TASK;
        for (uint64 round = 1; round <= 3; ++round) {
            ICheckpointAnchor.Checkpoint memory c = _checkpoint(round, 7); // 3 of 4
            head = keccak256(abi.encode(HEAD_TYPEHASH, TASK, round, c.recordDigest, c.rewardsRoot, head));
            vm.expectEmit();
            emit ICheckpointAnchor.Anchored(
                TASK, round, 0, 0, c.recordDigest, c.rewardsRoot, head, 7, c.signature
            );
            anchor.anchor(c);
            ICheckpointAnchor.Line memory line = anchor.lineOf(TASK);
            assertEq(line.head, head);
            assertEq(line.lastRound, round);
            (bytes32 root, uint48 anchoredAt) = anchor.rewardsOf(TASK, round);
            assertEq(root, c.rewardsRoot);
            assertEq(anchoredAt, block.timestamp);
        }
    }

    // --- who may sign
    function test_refusesTwoThirdsExactly() public {
        _start(3);
        _expectRefused(
            _checkpoint(1, 3),
            abi.encodeWithSelector(ICheckpointAnchor.NoQuorum.selector, 2 * MINIMUM, 3 * MINIMUM)
        );
        anchor.anchor(_checkpoint(1, 7));
    }

    function test_quorumCountsStakeNotHeads() public {
        _newOperator(7 * MINIMUM);
        for (uint256 i; i < 3; ++i) {
            _newOperator(MINIMUM);
        }
        _createTask(TASK);
        anchor.openEpoch(TASK, 0);
        _expectRefused(
            _checkpoint(1, 14),
            abi.encodeWithSelector(ICheckpointAnchor.NoQuorum.selector, 3 * MINIMUM, 10 * MINIMUM)
        );
        anchor.anchor(_checkpoint(1, 1));
    }

    function test_refusesNoSigners() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 7);
        c.signers = 0;
        c.signature = new bytes(256);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.NoQuorum.selector, 0, 4 * MINIMUM));
    }

    function test_refusesBitmapThatClaimsMoreThanSigned() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 1);
        c.signers = 7;
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
    }

    function test_refusesSignerOutOfRange() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        c.signers = 31;
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.SignerOutOfRange.selector, 4));
        c.signers = 15 | 1 << 255;
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.SignerOutOfRange.selector, 4));
    }

    function test_refusesForeignCommittee() public {
        _start(4);
        // Four keys that nobody registered sign the right digest.
        for (uint256 i; i < 4; ++i) {
            secrets[i] = i + 100;
        }
        _expectRefused(_checkpoint(1, 15), abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
    }

    function test_lateStakersAreNotInTheCommittee() public {
        _start(4);
        _newOperator(1000 * MINIMUM);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 16);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.SignerOutOfRange.selector, 4));
    }

    /// @dev Two keys of one owner that cancel: their sum is infinity, and infinity signs anything.
    function test_refusesInfinityAggregate() public {
        _newOperator(55, MINIMUM);
        _newOperator(BlsSigner.ORDER - 55, MINIMUM);
        _createTask(TASK);
        anchor.openEpoch(TASK, 0);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 3);
        assertEq(keccak256(c.signature), keccak256(new bytes(256)));
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.InfinityAggregate.selector));
    }

    // --- what was signed
    function test_refusesReplay() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        anchor.anchor(c);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.WrongRound.selector, 2, 1));
        c.round = 2; // the same signature for the next round
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
    }

    function test_refusesReplayForAnotherTask() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        c.task = keccak256("other");
        _createTask(c.task);
        anchor.openEpoch(c.task, 0);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
    }

    function test_refusesReplayOnAnotherContractOrChain() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        CheckpointAnchor twin = new CheckpointAnchor(registry, staking, tasks, EPOCH, LIFETIME, address(this));
        twin.openEpoch(TASK, 0);
        vm.expectRevert(ICheckpointAnchor.BadSignature.selector);
        twin.anchor(c);
        vm.chainId(8453);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
    }

    function test_refusesGapAndFork() public {
        _start(4);
        _expectRefused(
            _checkpoint(2, 15), abi.encodeWithSelector(ICheckpointAnchor.WrongRound.selector, 1, 2)
        );
        ICheckpointAnchor.Checkpoint memory signedEarly = _checkpoint(2, 15); // over the head before round 1
        anchor.anchor(_checkpoint(1, 15));
        _expectRefused(signedEarly, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
    }

    function test_refusesEditedFields() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        bytes memory why = abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector);
        c.view_ = 1;
        _expectRefused(c, why);
        c.view_ = 0;
        c.rewardsRoot = keccak256("mine");
        _expectRefused(c, why);
        c = _checkpoint(1, 15);
        c.recordDigest = keccak256("mine");
        _expectRefused(c, why);
    }

    function test_refusesNilRecord() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        c.recordDigest = 0;
        c.rewardsRoot = 0;
        _sign(c); // a real quorum of precommits for nil
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.NilRecord.selector));
    }

    function test_refusesMalformedSignaturesCleanly() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        bytes memory good = c.signature;
        c.signature = new bytes(255);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.MalformedSignature.selector));
        bytes memory bad = bytes.concat(good);
        bad[255] ^= 0x01; // off the curve: the pairing burns its share
        c.signature = bad;
        uint256 before = gasleft();
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
        assertLt(before - gasleft(), 400_000);
        c.signature = new bytes(256); // infinity
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
        c.signature = BlsSigner.provePossession(
            BlsSigner.sum(secrets, 15), anchor.voteDigest(c, anchor.lineOf(TASK).head)
        ); // the other suite
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.BadSignature.selector));
        c.signature = good;
        anchor.anchor(c);
    }

    function test_stopsAfterTheLastRound() public {
        _start(4);
        for (uint64 round = 1; round <= ROUNDS; ++round) {
            anchor.anchor(_checkpoint(round, 15));
        }
        _expectRefused(
            _checkpoint(ROUNDS + 1, 15),
            abi.encodeWithSelector(ICheckpointAnchor.TaskFinished.selector, ROUNDS)
        );
    }

    // --- epochs
    function test_epochsOpenInOrderAndNotTooEarly() public {
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.UnknownTask.selector, TASK));
        anchor.openEpoch(TASK, 0);
        _createTask(TASK);
        vm.expectRevert(ICheckpointAnchor.EmptyCommittee.selector);
        anchor.openEpoch(TASK, 0);
        for (uint256 i; i < 4; ++i) {
            _newOperator(MINIMUM);
        }
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.WrongEpoch.selector, 0, 1));
        anchor.openEpoch(TASK, 1);
        anchor.openEpoch(TASK, 0);
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.WrongEpoch.selector, 1, 0));
        anchor.openEpoch(TASK, 0);
        vm.expectRevert(
            abi.encodeWithSelector(ICheckpointAnchor.EpochTooEarly.selector, block.timestamp + EPOCH)
        );
        anchor.openEpoch(TASK, 1);
        skip(EPOCH);
        anchor.openEpoch(TASK, 1);
    }

    function test_refusesUnknownOlderAndExpiredEpochs() public {
        _start(4);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, 15);
        c.epoch = 1;
        _sign(c);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.UnknownEpoch.selector, TASK, 1));
        skip(EPOCH);
        anchor.openEpoch(TASK, 1);
        anchor.anchor(c);
        c = _checkpoint(2, 15);
        c.epoch = 0;
        _sign(c);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.WrongEpoch.selector, 1, 0));
        c.epoch = 1;
        _sign(c);
        uint256 end = block.timestamp + LIFETIME;
        vm.warp(end + 1);
        _expectRefused(c, abi.encodeWithSelector(ICheckpointAnchor.EpochExpired.selector, end));
        vm.warp(end);
        anchor.anchor(c);
    }

    function test_snapshotHoldsWhoWasSeatedThen() public {
        _start(4);
        vm.prank(operators[0]);
        staking.requestExit(MINIMUM);
        anchor.anchor(_checkpoint(1, 7)); // seat 0 still signs in its epoch, and can still be slashed
        skip(EPOCH);
        vm.expectEmit(true, true, false, false);
        emit ICheckpointAnchor.EpochOpened(TASK, 1, address(0), 0, operators);
        anchor.openEpoch(TASK, 1);
        (address snapshot,) = anchor.epochOf(TASK, 1);
        assertEq(snapshot.code.length, 145 + 3 * 112);
        assertEq(uint8(snapshot.code[0]), 0);
    }

    /// @dev Call gas from cold plus what the transaction pays before it; tests/process measures receipts on a node.
    function test_gasOfAnAnchorTransactionOfFourMembers() public {
        _start(4);
        (address snapshot,) = anchor.epochOf(TASK, 0);
        uint256[3] memory signers = [uint256(15), 7, 11];
        for (uint64 round = 1; round <= 3; ++round) {
            ICheckpointAnchor.Checkpoint memory c = _checkpoint(round, signers[round - 1]);
            vm.cool(address(anchor));
            vm.cool(snapshot);
            anchor.anchor(c);
            uint256 used = vm.lastCallGas().gasTotalUsed + _intrinsicGas(abi.encodeCall(anchor.anchor, (c)));
            console.log("anchor transaction of 4 members: signers, gas", c.signers, used);
            assertLe(used, 290_000);
        }
    }

    function _intrinsicGas(bytes memory data) private pure returns (uint256 total) {
        total = 21_000;
        for (uint256 i; i < data.length; ++i) {
            total += data[i] == 0 ? 4 : 16;
        }
    }
}
