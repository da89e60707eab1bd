// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ICheckpointAnchor} from "../../src/interfaces/ICheckpointAnchor.sol";
import {ITasks} from "../../src/interfaces/ITasks.sol";
import {Swarm} from "../Swarm.sol";

/// @title Everybody does everything in any order: stake, exit, withdraw, be slashed, anchor, claim, and a committee
/// that hands out more than it should.
contract Actor is Swarm {
    address[3] internal accounts = [address(0xa), address(0xb), address(0xc)];
    mapping(uint64 round => uint256[3]) internal earned;
    uint256 public claims;

    function setUp() public override {
        super.setUp();
        _start(4);
        staking.setSlasher(address(this));
    }

    /// @dev Short, so that withdrawals happen while epoch 0 still anchors.
    function _cooldown() internal pure override returns (uint256) {
        return 1 hours;
    }

    function deposit(uint256 who, uint256 amount) external {
        _stake(operators[who % 4], bound(amount, 1, 1e24));
    }

    function requestExit(uint256 who, uint256 amount) external {
        address operator = operators[who % 4];
        uint256 active = staking.activeOf(operator);
        if (active == 0) return;
        vm.prank(operator);
        staking.requestExit(bound(amount, 1, active));
    }

    function withdraw(uint256 who) external {
        vm.prank(operators[who % 4]);
        staking.withdraw();
    }

    function slash(uint256 who, uint256 amount) external {
        staking.slash(operators[who % 4], bound(amount, 1, 1e21));
    }

    function pass(uint256 time) external {
        skip(bound(time, 10 minutes, 1 days));
    }

    function openEpoch() external {
        anchor.openEpoch(TASK, anchor.lineOf(TASK).epochs);
    }

    /// @dev The committee may sign anything: sums up to three times the share of the rounds done.
    function anchorNext(uint256 a, uint256 b, uint256 c) external {
        uint64 round = anchor.lineOf(TASK).lastRound + 1;
        uint256 most = REWARD * round / ROUNDS;
        earned[round] = [bound(a, 0, most), bound(b, 0, most), bound(c, 0, most)];
        (, bytes32[3] memory leaves, bytes32 root) = _tree(round);
        leaves;
        // Seats may have moved since; sign with everyone who was there in epoch 0.
        ICheckpointAnchor.Checkpoint memory checkpoint = _checkpoint(round, 15, root);
        checkpoint.epoch = 0;
        _sign(checkpoint);
        anchor.anchor(checkpoint);
    }

    function claim(uint256 who, uint256 round_) external {
        uint64 last = anchor.lineOf(TASK).lastRound;
        if (last == 0) return;
        uint64 round = uint64(bound(round_, 1, last));
        who %= 3;
        (bytes32 pair, bytes32[3] memory leaves,) = _tree(round);
        bytes32[] memory proof = new bytes32[](who == 2 ? 1 : 2);
        if (who == 2) (proof[0]) = pair;
        else (proof[0], proof[1]) = (leaves[1 - who], leaves[2]);
        rewards.claim(TASK, round, accounts[who], earned[round][who], proof);
        ++claims;
    }

    function _tree(uint64 round) private view returns (bytes32 pair, bytes32[3] memory leaves, bytes32 root) {
        for (uint256 i; i < 3; ++i) {
            leaves[i] = _leaf(TASK, accounts[i], earned[round][i]);
        }
        pair = _pair(leaves[0], leaves[1]);
        root = _pair(pair, leaves[2]);
    }

    function _pair(bytes32 a, bytes32 b) private pure returns (bytes32) {
        return a < b ? keccak256(bytes.concat(a, b)) : keccak256(bytes.concat(b, a));
    }

    // --- what must hold
    function check() external view {
        uint256 held;
        (address[] memory seated, uint128[] memory weights) = staking.seats();
        for (uint256 i; i < operators.length; ++i) {
            (uint256 unbonding,) = staking.unbondingOf(operators[i]);
            held += staking.activeOf(operators[i]) + unbonding;
        }
        assertEq(staking.totalHeld(), held);
        assertEq(flock.balanceOf(address(staking)), held);
        for (uint256 i; i < seated.length; ++i) {
            assertGe(weights[i], MINIMUM);
            assertEq(weights[i], staking.activeOf(seated[i]));
            for (uint256 j; j < i; ++j) {
                assertTrue(seated[i] != seated[j]);
            }
        }
        ITasks.Task memory t = tasks.taskOf(TASK);
        uint256 paid;
        for (uint256 i; i < 3; ++i) {
            assertEq(flock.balanceOf(accounts[i]), rewards.claimedOf(TASK, accounts[i]));
            paid += rewards.claimedOf(TASK, accounts[i]);
        }
        assertEq(t.paid, paid);
        assertLe(paid, tasks.capAtRoundDown(TASK, anchor.lineOf(TASK).lastRound));
        assertEq(tasks.totalEscrow(), REWARD - paid);
        assertEq(flock.balanceOf(address(tasks)), REWARD - paid);
    }
}

contract SolvencyInvariant is Swarm {
    Actor internal actor;

    function setUp() public override {
        actor = new Actor();
        actor.setUp();
        bytes4[] memory moves = new bytes4[](8);
        moves[0] = Actor.deposit.selector;
        moves[1] = Actor.requestExit.selector;
        moves[2] = Actor.withdraw.selector;
        moves[3] = Actor.slash.selector;
        moves[4] = Actor.pass.selector;
        moves[5] = Actor.openEpoch.selector;
        moves[6] = Actor.anchorNext.selector;
        moves[7] = Actor.claim.selector;
        targetContract(address(actor));
        targetSelector(FuzzSelector(address(actor), moves));
    }

    /// Staking holds what it owes, escrow what it has not paid, and nobody is paid ahead of the rounds.
    function invariant_solvent() public view {
        actor.check();
    }
}
