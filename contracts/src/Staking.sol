// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {Checkpoints} from "@openzeppelin/contracts/utils/structs/Checkpoints.sol";

import {IPeerRegistry} from "./interfaces/IPeerRegistry.sol";
import {IStaking} from "./interfaces/IStaking.sol";
import {CommitteeCode} from "./libraries/CommitteeCode.sol";

/// @notice See IStaking, which states the law of this contract.
/// @dev Seats are few, and the list of them is all that an epoch reads: registering without stake cannot make
/// opening an epoch too dear, and a crowd with small stakes cannot keep a larger one out.
contract Staking is IStaking, Ownable2Step, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;
    using Checkpoints for Checkpoints.Trace208;

    struct Account {
        uint128 active;
        uint128 unbonding;
        uint48 releaseAt;
        uint16 seat; // index in _seats plus one; zero when not seated
    }

    IERC20 public immutable FLOCK;
    IPeerRegistry public immutable REGISTRY;
    uint256 public immutable MINIMUM_STAKE;
    uint256 public immutable COOLDOWN_SECONDS;
    address public immutable SLASH_SINK;

    /// @notice The one contract that may slash; zero until there is one.
    address public slasher;
    uint256 public override totalHeld;
    mapping(address operator => Account) private _accounts;
    mapping(address operator => Checkpoints.Trace208) private _history;
    address[] private _seats;

    constructor(
        IERC20 flock,
        IPeerRegistry registry,
        uint256 minimumStake,
        uint256 cooldownSeconds,
        address slashSink,
        address owner
    ) Ownable(owner) {
        if (minimumStake == 0) revert ZeroAmount();
        FLOCK = flock;
        REGISTRY = registry;
        MINIMUM_STAKE = minimumStake;
        COOLDOWN_SECONDS = cooldownSeconds;
        SLASH_SINK = slashSink;
    }

    function setSlasher(address slasher_) external onlyOwner {
        slasher = slasher_;
        emit SlasherSet(slasher_);
    }

    function deposit(uint256 amount) external override nonReentrant {
        if (amount == 0) revert ZeroAmount();
        if (!REGISTRY.isRegistered(msg.sender)) revert NotRegistered(msg.sender);
        Account storage a = _accounts[msg.sender];
        uint256 active = a.active + amount;
        _setActive(msg.sender, a, active);
        totalHeld += amount;
        FLOCK.safeTransferFrom(msg.sender, address(this), amount);
        emit Deposited(msg.sender, amount, active);
        if (a.seat == 0 && active >= MINIMUM_STAKE) _seat(msg.sender, a);
    }

    function requestExit(uint256 amount) external override nonReentrant {
        if (amount == 0) revert ZeroAmount();
        Account storage a = _accounts[msg.sender];
        if (amount > a.active) revert InsufficientStake(a.active, amount);
        a.unbonding += uint128(amount); // fits: at most active, a uint128
        a.releaseAt = SafeCast.toUint48(block.timestamp + COOLDOWN_SECONDS);
        _setActive(msg.sender, a, a.active - amount);
        _unseatBelowMinimum(msg.sender, a);
        emit ExitRequested(msg.sender, amount, a.releaseAt);
    }

    function withdraw() external override nonReentrant returns (uint256 amount) {
        Account storage a = _accounts[msg.sender];
        amount = a.unbonding;
        if (amount == 0) revert NothingUnbonding();
        if (block.timestamp < a.releaseAt) revert CoolingDown(a.releaseAt);
        a.unbonding = 0;
        totalHeld -= amount;
        FLOCK.safeTransfer(msg.sender, amount);
        emit Withdrawn(msg.sender, amount);
    }

    function takeSeat(address operator) external override nonReentrant {
        Account storage a = _accounts[operator];
        if (a.seat != 0) revert AlreadySeated(operator);
        if (a.active < MINIMUM_STAKE) revert BelowMinimum(a.active, MINIMUM_STAKE);
        if (!_seat(operator, a)) revert SeatsFull(_accounts[_smallest()].active);
    }

    function slash(address operator, uint256 amount)
        external
        override
        nonReentrant
        returns (uint256 slashed)
    {
        if (msg.sender != slasher) revert NotSlasher(msg.sender);
        Account storage a = _accounts[operator];
        uint256 active = a.active;
        uint256 held = active + a.unbonding;
        slashed = Math.min(amount, held);
        if (slashed == 0) revert ZeroAmount();
        uint256 fromActiveUp = Math.mulDiv(slashed, active, held, Math.Rounding.Ceil);
        a.unbonding -= uint128(slashed - fromActiveUp);
        _setActive(operator, a, active - fromActiveUp);
        _unseatBelowMinimum(operator, a);
        totalHeld -= slashed;
        FLOCK.safeTransfer(SLASH_SINK, slashed);
        emit Slashed(operator, fromActiveUp, slashed - fromActiveUp);
    }

    function activeOf(address operator) external view override returns (uint256) {
        return _accounts[operator].active;
    }

    function unbondingOf(address operator)
        external
        view
        override
        returns (uint256 amount, uint256 releaseAt)
    {
        Account storage a = _accounts[operator];
        return (a.unbonding, a.releaseAt);
    }

    function activeAt(address operator, uint48 timepoint) external view override returns (uint256) {
        if (timepoint >= block.timestamp) revert FutureLookup(timepoint); // this second can still change
        return _history[operator].upperLookup(timepoint);
    }

    function seats() external view override returns (address[] memory operators, uint128[] memory weights) {
        operators = _seats;
        weights = new uint128[](operators.length);
        for (uint256 i; i < operators.length; ++i) {
            weights[i] = _accounts[operators[i]].active;
        }
    }

    function _setActive(address operator, Account storage a, uint256 active) private {
        a.active = SafeCast.toUint128(active);
        _history[operator].push(uint48(block.timestamp), SafeCast.toUint208(active));
    }

    /// @return whether there was a place
    function _seat(address operator, Account storage a) private returns (bool) {
        if (_seats.length == CommitteeCode.MAX_MEMBERS) {
            address smallest = _smallest();
            if (_accounts[smallest].active >= a.active) return false;
            _unseat(smallest, _accounts[smallest]);
        }
        _seats.push(operator);
        a.seat = uint16(_seats.length);
        emit SeatTaken(operator);
        return true;
    }

    function _unseatBelowMinimum(address operator, Account storage a) private {
        if (a.seat != 0 && a.active < MINIMUM_STAKE) _unseat(operator, a);
    }

    function _unseat(address operator, Account storage a) private {
        uint256 index = a.seat - 1;
        address last = _seats[_seats.length - 1];
        _seats[index] = last;
        _accounts[last].seat = uint16(index + 1);
        _seats.pop();
        a.seat = 0; // after the line above: `last` may be `operator`
        emit SeatLeft(operator);
    }

    /// @dev Called with seats full only. The latest of equals, so that an early small operator is not evicted first.
    function _smallest() private view returns (address smallest) {
        uint256 least = type(uint256).max;
        for (uint256 i; i < _seats.length; ++i) {
            uint256 active = _accounts[_seats[i]].active;
            if (active <= least) (least, smallest) = (active, _seats[i]);
        }
    }
}
