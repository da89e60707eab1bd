// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ICheckpointAnchor} from "../../src/interfaces/ICheckpointAnchor.sol";
import {CommitteeCode} from "../../src/libraries/CommitteeCode.sol";
import {BlsSigner} from "../BlsSigner.sol";
import {Swarm} from "../Swarm.sol";

contract QuorumFuzz is Swarm {
    uint256 internal constant MEMBERS = 9;

    address internal snapshot;
    uint256[MEMBERS] internal stakes;

    function setUp() public override {
        super.setUp();
        for (uint256 i; i < MEMBERS; ++i) {
            stakes[i] = MINIMUM + uint256(keccak256(abi.encode(i))) % (5 * MINIMUM);
            _newOperator(stakes[i]);
        }
        _createTask(TASK);
        snapshot = anchor.openEpoch(TASK, 0);
    }

    /// Whichever side of the bitmap is walked, key and weight are those of the signers.
    function testFuzz_aggregateIsTheSumOfTheSigners(uint256 signers) public view {
        signers = bound(signers, 0, (1 << MEMBERS) - 1);
        (uint256[4] memory key, uint256 weight, uint256 total) =
            CommitteeCode.aggregate(snapshot, MEMBERS, signers);
        (uint256 expected, uint256 all) = _weights(signers);
        assertEq(weight, expected);
        assertEq(total, all);
        bytes memory expectedKey =
            signers == 0 ? new bytes(128) : BlsSigner.publicKey(BlsSigner.sum(secrets, signers));
        assertEq(abi.encodePacked(key), expectedKey);
    }

    /// A set of signers anchors exactly when it has more than two thirds of the stake.
    function testFuzz_quorum(uint256 signers) public {
        signers = bound(signers, 1, (1 << MEMBERS) - 1);
        (uint256 weight, uint256 total) = _weights(signers);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, signers);
        if (3 * weight <= 2 * total) {
            vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.NoQuorum.selector, weight, total));
        }
        anchor.anchor(c);
    }

    /// No other bitmap fits a signature.
    function testFuzz_bitmapIsBound(uint256 signers, uint256 claimed) public {
        signers = bound(signers, 1, (1 << MEMBERS) - 1);
        claimed = bound(claimed, 1, (1 << MEMBERS) - 1);
        vm.assume(signers != claimed);
        ICheckpointAnchor.Checkpoint memory c = _checkpoint(1, signers);
        c.signers = claimed;
        vm.expectRevert();
        anchor.anchor(c);
    }

    function testFuzz_popCount(uint256 word) public pure {
        uint256 n;
        for (uint256 i; i < 256; ++i) {
            n += word >> i & 1;
        }
        assertEq(CommitteeCode.popCount(word), n);
    }

    function _weights(uint256 signers) private view returns (uint256 weight, uint256 total) {
        for (uint256 i; i < MEMBERS; ++i) {
            total += stakes[i];
            if (signers >> i & 1 == 1) weight += stakes[i];
        }
    }
}
