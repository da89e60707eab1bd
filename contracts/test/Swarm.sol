// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {Test} from "forge-std/Test.sol";

import {CheckpointAnchor} from "../src/CheckpointAnchor.sol";
import {FlockToken} from "../src/FlockToken.sol";
import {PeerRegistry} from "../src/PeerRegistry.sol";
import {Rewards} from "../src/Rewards.sol";
import {Staking} from "../src/Staking.sol";
import {Tasks} from "../src/Tasks.sol";
import {ICheckpointAnchor} from "../src/interfaces/ICheckpointAnchor.sol";
import {IRewards} from "../src/interfaces/IRewards.sol";
import {BlsSigner} from "./BlsSigner.sol";

/// @title All contracts deployed, and operators that can register, stake and sign.
abstract contract Swarm is Test {
    uint256 internal constant MINIMUM = 100e18;
    uint256 internal constant COOLDOWN = 14 days;
    uint256 internal constant EPOCH = 1 days;
    uint256 internal constant LIFETIME = 7 days;
    uint256 internal constant CHALLENGE = 1 hours;
    bytes32 internal constant TASK = keccak256("task");
    uint64 internal constant ROUNDS = 10;
    uint128 internal constant REWARD = 1000e18;

    FlockToken internal flock;
    PeerRegistry internal registry;
    Staking internal staking;
    Tasks internal tasks;
    CheckpointAnchor internal anchor;
    Rewards internal rewards;
    address internal creator = makeAddr("creator");
    address internal sink = makeAddr("sink");
    address[] internal operators;
    uint256[] internal secrets;

    function setUp() public virtual {
        vm.chainId(84532);
        vm.warp(1_800_000_000);
        flock = new FlockToken(address(this), 1e8 * 1e18);
        registry = new PeerRegistry(address(this));
        staking = new Staking(flock, registry, MINIMUM, _cooldown(), sink, address(this));
        tasks = new Tasks(flock, vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 2));
        anchor = new CheckpointAnchor(registry, staking, tasks, EPOCH, LIFETIME, address(this));
        rewards = new Rewards(tasks, anchor, CHALLENGE);
        assertEq(tasks.REWARDS(), address(rewards));
    }

    function _cooldown() internal pure virtual returns (uint256) {
        return COOLDOWN;
    }

    // --- steps of a swarm
    function _newOperator(uint256 stake) internal returns (address operator) {
        uint256 secret = uint256(keccak256(abi.encode("secret", secrets.length))) % BlsSigner.ORDER;
        return _newOperator(secret, stake);
    }

    function _newOperator(uint256 secret, uint256 stake) internal returns (address operator) {
        operator = vm.addr(secrets.length + 1);
        operators.push(operator);
        secrets.push(secret);
        _register(operator, secret);
        if (stake != 0) _stake(operator, stake);
    }

    function _register(address operator, uint256 secret) internal {
        bytes memory peerId = _peerId(operator);
        bytes memory key = BlsSigner.publicKey(secret);
        bytes memory proof = BlsSigner.provePossession(
            secret, registry.possessionRoot(operator, keccak256(peerId), keccak256(key))
        );
        vm.prank(operator);
        registry.register(peerId, key, proof);
    }

    function _stake(address operator, uint256 amount) internal {
        flock.transfer(operator, amount);
        vm.startPrank(operator);
        flock.approve(address(staking), amount);
        staking.deposit(amount);
        vm.stopPrank();
    }

    function _createTask(bytes32 task) internal {
        flock.transfer(creator, REWARD);
        vm.startPrank(creator);
        flock.approve(address(tasks), REWARD);
        tasks.createTask(task, ROUNDS, REWARD);
        vm.stopPrank();
    }

    /// @dev n operators with equal stake, a task, and its first epoch.
    function _start(uint256 n) internal {
        for (uint256 i; i < n; ++i) {
            _newOperator(MINIMUM);
        }
        _createTask(TASK);
        anchor.openEpoch(TASK, 0);
    }

    function _peerId(address operator) internal pure returns (bytes memory) {
        return abi.encodePacked(hex"002408011220", keccak256(abi.encode("ed25519", operator)));
    }

    /// @dev A signed checkpoint for the next round.
    function _checkpoint(uint64 round, uint256 signers)
        internal
        view
        returns (ICheckpointAnchor.Checkpoint memory)
    {
        return _checkpoint(round, signers, keccak256(abi.encode("rewards", round)));
    }

    function _checkpoint(uint64 round, uint256 signers, bytes32 rewardsRoot)
        internal
        view
        returns (ICheckpointAnchor.Checkpoint memory c)
    {
        c = ICheckpointAnchor.Checkpoint({
            task: TASK,
            epoch: anchor.lineOf(TASK).epochs - 1,
            round: round,
            view_: 0,
            recordDigest: keccak256(abi.encode("record", round)),
            rewardsRoot: rewardsRoot,
            signers: signers,
            signature: ""
        });
        _sign(c);
    }

    /// @dev By those that c.signers names.
    function _sign(ICheckpointAnchor.Checkpoint memory c) internal view {
        bytes32 digest = anchor.voteDigest(c, anchor.lineOf(c.task).head);
        c.signature = BlsSigner.sign(BlsSigner.sum(secrets, c.signers), digest);
    }

    function _leaf(bytes32 task, address account, uint256 cumulative) internal pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(task, account, cumulative))));
    }
}
