// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IRewards} from "../../src/interfaces/IRewards.sol";
import {ITasks} from "../../src/interfaces/ITasks.sol";
import {Swarm} from "../Swarm.sol";

contract RewardsTest is Swarm {
    address internal alice = makeAddr("alice");
    address internal bob = makeAddr("bob");

    function setUp() public override {
        super.setUp();
        _start(4);
    }

    /// @dev Anchors `round` with a tree of two leaves; returns alice's proof.
    function _anchorRewards(uint64 round, uint256 toAlice, uint256 toBob)
        internal
        returns (bytes32[] memory proof)
    {
        (bytes32 a, bytes32 b) = (_leaf(TASK, alice, toAlice), _leaf(TASK, bob, toBob));
        bytes32 root = a < b ? keccak256(bytes.concat(a, b)) : keccak256(bytes.concat(b, a));
        anchor.anchor(_checkpoint(round, 15, root));
        proof = new bytes32[](1);
        proof[0] = b;
    }

    function test_claimPaysTheDifferenceOnce() public {
        bytes32[] memory one = _anchorRewards(1, 60e18, 40e18);
        bytes32[] memory two = _anchorRewards(2, 70e18, 130e18);
        skip(CHALLENGE);
        rewards.claim(TASK, 1, alice, 60e18, one); // by anyone
        assertEq(flock.balanceOf(alice), 60e18);
        vm.expectRevert(abi.encodeWithSelector(IRewards.NothingDue.selector, 60e18, 60e18));
        rewards.claim(TASK, 1, alice, 60e18, one);
        assertEq(rewards.claim(TASK, 2, alice, 70e18, two), 10e18);
        assertEq(flock.balanceOf(alice), 70e18);
        vm.expectRevert(abi.encodeWithSelector(IRewards.NothingDue.selector, 70e18, 60e18));
        rewards.claim(TASK, 1, alice, 60e18, one);
        assertEq(tasks.totalEscrow(), REWARD - 70e18);
    }

    function test_refusesEarlyAndUnanchored() public {
        bytes32[] memory proof = _anchorRewards(1, 60e18, 40e18);
        vm.expectRevert(
            abi.encodeWithSelector(IRewards.ChallengeWindowOpen.selector, block.timestamp + CHALLENGE)
        );
        rewards.claim(TASK, 1, alice, 60e18, proof);
        vm.expectRevert(abi.encodeWithSelector(IRewards.NotAnchored.selector, TASK, 2));
        rewards.claim(TASK, 2, alice, 60e18, proof);
    }

    function test_refusesForgedLeaves() public {
        bytes32[] memory proof = _anchorRewards(1, 60e18, 40e18);
        skip(CHALLENGE);
        vm.expectRevert(IRewards.BadMerkleProof.selector);
        rewards.claim(TASK, 1, alice, 61e18, proof);
        vm.expectRevert(IRewards.BadMerkleProof.selector);
        rewards.claim(TASK, 1, bob, 60e18, proof);
        vm.expectRevert(IRewards.BadMerkleProof.selector);
        rewards.claim(TASK, 1, alice, 60e18, new bytes32[](0));
    }

    /// Even a captured committee can not pay out ahead of the rounds that were done.
    function test_refusesMoreThanTheRoundsDone() public {
        bytes32[] memory proof = _anchorRewards(1, REWARD / ROUNDS + 1, 0);
        skip(CHALLENGE);
        vm.expectRevert(
            abi.encodeWithSelector(ITasks.AboveRoundCap.selector, REWARD / ROUNDS, REWARD / ROUNDS + 1)
        );
        rewards.claim(TASK, 1, alice, REWARD / ROUNDS + 1, proof);
        assertEq(rewards.claimedOf(TASK, alice), 0);
    }

    function test_onlyRewardsMaySpendTheEscrow() public {
        vm.expectRevert(abi.encodeWithSelector(ITasks.NotRewards.selector, address(this)));
        tasks.pay(TASK, 1, alice, 1);
    }

    function test_tasksAreCreatedOnce() public {
        vm.expectRevert(abi.encodeWithSelector(ITasks.TaskExists.selector, TASK));
        tasks.createTask(TASK, 1, 0);
        vm.expectRevert(ITasks.ZeroRounds.selector);
        tasks.createTask(keccak256("x"), 0, 0);
        vm.expectRevert(ITasks.ZeroTask.selector);
        tasks.createTask(0, 1, 0);
        vm.expectRevert(abi.encodeWithSelector(ITasks.UnknownTask.selector, keccak256("x")));
        tasks.capAtRoundDown(keccak256("x"), 1);
        assertEq(tasks.taskOf(TASK).creator, creator);
    }
}
