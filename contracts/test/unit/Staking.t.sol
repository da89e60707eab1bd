// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";

import {IStaking} from "../../src/interfaces/IStaking.sol";
import {CommitteeCode} from "../../src/libraries/CommitteeCode.sol";
import {Swarm} from "../Swarm.sol";

contract StakingTest is Swarm {
    address internal alice;

    function setUp() public override {
        super.setUp();
        alice = _newOperator(0);
    }

    function test_depositNeedsRegistration() public {
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotRegistered.selector, address(this)));
        staking.deposit(1);
    }

    function test_seatFromTheMinimumOn() public {
        _stake(alice, MINIMUM - 1);
        (address[] memory seated,) = staking.seats();
        assertEq(seated.length, 0);
        vm.expectRevert(abi.encodeWithSelector(IStaking.BelowMinimum.selector, MINIMUM - 1, MINIMUM));
        staking.takeSeat(alice);
        _stake(alice, 1);
        uint128[] memory weights;
        (seated, weights) = staking.seats();
        assertEq(seated[0], alice);
        assertEq(weights[0], MINIMUM);
        vm.expectRevert(abi.encodeWithSelector(IStaking.AlreadySeated.selector, alice));
        staking.takeSeat(alice);
    }

    function test_exitCoolsDown() public {
        _stake(alice, 3 * MINIMUM);
        vm.startPrank(alice);
        vm.expectRevert(
            abi.encodeWithSelector(IStaking.InsufficientStake.selector, 3 * MINIMUM, 3 * MINIMUM + 1)
        );
        staking.requestExit(3 * MINIMUM + 1);
        vm.expectRevert(IStaking.NothingUnbonding.selector);
        staking.withdraw();
        staking.requestExit(MINIMUM);
        skip(COOLDOWN - 1);
        vm.expectRevert(abi.encodeWithSelector(IStaking.CoolingDown.selector, block.timestamp + 1));
        staking.withdraw();
        staking.requestExit(MINIMUM); // starts the cooldown of both anew
        skip(1);
        vm.expectRevert(abi.encodeWithSelector(IStaking.CoolingDown.selector, block.timestamp + COOLDOWN - 1));
        staking.withdraw();
        skip(COOLDOWN - 1);
        assertEq(staking.withdraw(), 2 * MINIMUM);
        assertEq(flock.balanceOf(alice), 2 * MINIMUM);
        assertEq(staking.activeOf(alice), MINIMUM);
    }

    function test_exitBelowTheMinimumLeavesTheSeat() public {
        _stake(alice, MINIMUM);
        address bob = _newOperator(MINIMUM);
        vm.prank(alice);
        staking.requestExit(1);
        (address[] memory seated,) = staking.seats();
        assertEq(seated.length, 1);
        assertEq(seated[0], bob);
    }

    function test_slashTakesFromActiveAndUnbondingAlike() public {
        _stake(alice, 400);
        vm.prank(alice);
        staking.requestExit(100);
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotSlasher.selector, address(this)));
        staking.slash(alice, 1);
        staking.setSlasher(address(this));
        assertEq(staking.slash(alice, 41), 41); // 30.75 active, rounded up
        assertEq(staking.activeOf(alice), 300 - 31);
        (uint256 unbonding,) = staking.unbondingOf(alice);
        assertEq(unbonding, 90);
        assertEq(staking.slash(alice, type(uint256).max), 359);
        assertEq(staking.totalHeld(), 0);
        assertEq(flock.balanceOf(sink), 400);
    }

    function test_onlyTheOwnerNamesTheSlasher() public {
        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, alice));
        vm.prank(alice);
        staking.setSlasher(alice);
    }

    function test_historyByTimestamp() public {
        uint48 start = uint48(block.timestamp);
        _stake(alice, 10);
        skip(5);
        _stake(alice, 20);
        skip(5);
        assertEq(staking.activeAt(alice, start - 1), 0);
        assertEq(staking.activeAt(alice, start + 4), 10);
        assertEq(staking.activeAt(alice, start + 5), 30);
        vm.expectRevert(abi.encodeWithSelector(IStaking.FutureLookup.selector, start + 10));
        staking.activeAt(alice, start + 10);
    }

    /// A crowd that fills every seat with small stakes can not keep a larger one out.
    function test_largerStakeTakesTheSmallestSeat() public {
        _stake(alice, MINIMUM + 1);
        for (uint256 i = 1; i < CommitteeCode.MAX_MEMBERS; ++i) {
            _newOperator(MINIMUM + 1);
        }
        address late = _newOperator(MINIMUM + 1); // as much as the smallest is not more
        (address[] memory seated,) = staking.seats();
        assertEq(seated.length, CommitteeCode.MAX_MEMBERS);
        vm.expectRevert(abi.encodeWithSelector(IStaking.SeatsFull.selector, MINIMUM + 1));
        staking.takeSeat(late);
        _stake(late, 1);
        (seated,) = staking.seats();
        assertEq(seated.length, CommitteeCode.MAX_MEMBERS);
        assertEq(seated[CommitteeCode.MAX_MEMBERS - 1], late);

        // The largest committee fits a contract and a block (cap 16.7 M gas), and anchors.
        _createTask(TASK);
        uint256 before = gasleft();
        anchor.openEpoch(TASK, 0);
        assertLt(before - gasleft(), 16_000_000);
        secrets[CommitteeCode.MAX_MEMBERS - 1] = secrets[CommitteeCode.MAX_MEMBERS]; // late holds the last seat
        secrets.pop();
        anchor.anchor(_checkpoint(1, (1 << 218) - 1 - (1 << 7) - (1 << 217)));
        assertLt(vm.lastCallGas().gasTotalUsed, 300_000);
    }
}
