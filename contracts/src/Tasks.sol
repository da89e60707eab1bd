// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

import {ITasks} from "./interfaces/ITasks.sol";

/// @notice See ITasks, which states the law of this contract.
contract Tasks is ITasks, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    IERC20 public immutable FLOCK;
    address public immutable REWARDS;

    uint256 public override totalEscrow;
    mapping(bytes32 task => Task) private _tasks;

    /// @param rewards the only contract that may pay; its address is computed before it is deployed.
    constructor(IERC20 flock, address rewards) {
        FLOCK = flock;
        REWARDS = rewards;
    }

    function createTask(bytes32 task, uint64 rounds, uint128 reward) external override nonReentrant {
        if (task == 0) revert ZeroTask();
        if (rounds == 0) revert ZeroRounds();
        if (_tasks[task].rounds != 0) revert TaskExists(task);
        _tasks[task] = Task(msg.sender, rounds, reward, 0);
        totalEscrow += reward;
        FLOCK.safeTransferFrom(msg.sender, address(this), reward);
        emit TaskCreated(task, msg.sender, rounds, reward);
    }

    function pay(bytes32 task, uint64 round, address account, uint256 amount) external override nonReentrant {
        if (msg.sender != REWARDS) revert NotRewards(msg.sender);
        uint256 cap = capAtRoundDown(task, round);
        uint256 paid = _tasks[task].paid + amount;
        if (paid > cap) revert AboveRoundCap(cap, paid);
        _tasks[task].paid = uint128(paid); // fits: cap <= reward, a uint128
        totalEscrow -= amount;
        FLOCK.safeTransfer(account, amount);
        emit RewardPaid(task, account, amount);
    }

    function capAtRoundDown(bytes32 task, uint64 round) public view override returns (uint256) {
        Task storage t = _tasks[task];
        uint256 rounds = t.rounds;
        if (rounds == 0) revert UnknownTask(task);
        return uint256(t.reward) * Math.min(round, rounds) / rounds; // below 2^192
    }

    function taskOf(bytes32 task) external view override returns (Task memory) {
        return _tasks[task];
    }

    function roundsOf(bytes32 task) external view override returns (uint64) {
        return _tasks[task].rounds;
    }
}
