// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ERC20Capped} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Capped.sol";
import {Test} from "forge-std/Test.sol";

import {FlockToken} from "../../src/FlockToken.sol";

contract FlockTokenTest is Test {
    function test_supplyGoesToTheDistributor() public {
        FlockToken token = new FlockToken(address(7), 5);
        assertEq(token.balanceOf(address(7)), 5);
        assertEq(token.totalSupply(), 5);
        assertEq(token.cap(), 1e27);
    }

    function test_supplyIsCapped() public {
        new FlockToken(address(7), 1e27);
        vm.expectRevert(abi.encodeWithSelector(ERC20Capped.ERC20ExceededCap.selector, 1e27 + 1, 1e27));
        new FlockToken(address(7), 1e27 + 1);
    }

    function test_permit() public {
        (address owner, uint256 key) = makeAddrAndKey("owner");
        FlockToken token = new FlockToken(owner, 5);
        bytes32 typehash =
            keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");
        bytes32 body = keccak256(abi.encode(typehash, owner, address(this), 5, 0, block.timestamp));
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", token.DOMAIN_SEPARATOR(), body));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        token.permit(owner, address(this), 5, block.timestamp, v, r, s);
        assertTrue(token.transferFrom(owner, address(9), 5));
        assertEq(token.balanceOf(address(9)), 5);
    }
}
