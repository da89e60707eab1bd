// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title What is trained, for how many rounds, and the escrow that pays for it.
interface ITasks {
    struct Task {
        address creator;
        uint64 rounds;
        uint128 reward;
        uint128 paid;
    }

    event TaskCreated(bytes32 indexed task, address indexed creator, uint64 rounds, uint256 reward);
    event RewardPaid(bytes32 indexed task, address indexed account, uint256 amount);

    error TaskExists(bytes32 task);
    error UnknownTask(bytes32 task);
    error ZeroRounds();
    error ZeroTask();
    error NotRewards(address caller);
    /// @notice Would pay out more than the share of the rounds that are done.
    error AboveRoundCap(uint256 cap, uint256 asked);

    /// @notice Escrow `reward` FLOCK of the caller for `rounds` rounds of the task whose spec hashes to `task`.
    function createTask(bytes32 task, uint64 rounds, uint128 reward) external;

    /// @notice Pay from the escrow of `task`; only the Rewards contract. `round` bounds the total.
    function pay(bytes32 task, uint64 round, address account, uint256 amount) external;

    /// @notice All that may have been paid once `round` is anchored: reward * round / rounds, rounded down.
    function capAtRoundDown(bytes32 task, uint64 round) external view returns (uint256);

    function taskOf(bytes32 task) external view returns (Task memory);

    /// @notice Rounds of a task; zero when it does not exist.
    function roundsOf(bytes32 task) external view returns (uint64);

    /// @notice Escrow of all tasks not yet paid; never above the token balance.
    function totalEscrow() external view returns (uint256);
}
