// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

/// @title FLOCK at stake per operator, and the seats it buys.
/// @notice Active stake gives weight in committees. Unbonding stake gives none but can still be slashed until
/// the cooldown is over, so nobody signs something false and runs. Time is `block.timestamp`, never blocks.
interface IStaking {
    event Deposited(address indexed operator, uint256 amount, uint256 active);
    event ExitRequested(address indexed operator, uint256 amount, uint256 releaseAt);
    event Withdrawn(address indexed operator, uint256 amount);
    event Slashed(address indexed operator, uint256 fromActive, uint256 fromUnbonding);
    event SeatTaken(address indexed operator);
    event SeatLeft(address indexed operator);
    event SlasherSet(address slasher);

    error NotRegistered(address operator);
    error ZeroAmount();
    error InsufficientStake(uint256 available, uint256 asked);
    error NothingUnbonding();
    error CoolingDown(uint256 releaseAt);
    error NotSlasher(address caller);
    error BelowMinimum(uint256 active, uint256 minimum);
    error AlreadySeated(address operator);
    error SeatsFull(uint256 smallest);
    error FutureLookup(uint256 timepoint);

    /// @notice Add to the caller's active stake; takes a seat when it can. The caller must be registered.
    function deposit(uint256 amount) external;

    /// @notice Move active stake to unbonding. A later request restarts the cooldown of all of it.
    function requestExit(uint256 amount) external;

    /// @notice Pay out everything unbonding once the cooldown is over.
    function withdraw() external returns (uint256 amount);

    /// @notice Take a free seat, or that of the smallest seated operator when `operator` has more stake.
    function takeSeat(address operator) external;

    /// @notice Destroy the claim of `operator` to `amount`, or to all it has if that is less; sent to the sink.
    /// Active and unbonding bear it in proportion, the active part rounded up.
    function slash(address operator, uint256 amount) external returns (uint256 slashed);

    function activeOf(address operator) external view returns (uint256);
    function unbondingOf(address operator) external view returns (uint256 amount, uint256 releaseAt);

    /// @notice Active stake at a past second (inclusive).
    function activeAt(address operator, uint48 timepoint) external view returns (uint256);

    /// @notice Everyone seated with its active stake, in seat order: order of taking the seat, except that the last
    /// fills the place of one that leaves.
    function seats() external view returns (address[] memory operators, uint128[] memory weights);

    /// @notice Sum over all operators of active and unbonding stake; never above the token balance.
    function totalHeld() external view returns (uint256);
}
